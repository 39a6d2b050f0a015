"""What should an MLP read less of: Monarch's slices, rank, or neurons?

Three ways to read a share of an MLP's weights, at equal bytes a token:

  low rank   each matrix is the nearest one of some rank
  Monarch    each slice of a matrix, of `blocks` x `blocks`, is the nearest one
             of its own rank (https://arxiv.org/abs/2204.00595)
  Deja Vu    each token computes the neurons that a predictor, whose weights
             count, expects to matter (https://arxiv.org/abs/2310.17157)
  oracle     as Deja Vu, with the neurons that truly matter and no predictor

The first two are shown as projected, and after some steps of training on other
text ("tuned"), which the dense model gets too. One small ReLU model is trained,
or with `--monarch.model=DIR` a checkpoint is read.

The figure shows loss above the dense model's against the bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
from typing import Any

from etils import epy

from joma.studies import settings as settings_lib
from joma.studies import study as study_lib
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require

with epy.lazy_imports():  # --help imports this file, and waits for no jax.
  import jax
  import jax.numpy as jnp
  from matplotlib import figure as mpl_figure
  import numpy as np

  from joma.inference.sparsity import contextual_config
  from joma.inference.sparsity import unit_rules
  from joma.studies import claims
  from joma.studies import drawing
  from joma.studies import once
  from joma.studies import parts
  from joma.studies.systems.projections import compressed_mlps
  from joma.systems.reuse import distillation
  from joma.transformer import config as configs
  from joma.transformer import model as models
  from joma.transformer.hf import pretrained
  from joma.transformer.layers import monarch
  from joma.transformer.layers import projections
  from joma.transformer.text import corpus as corpus_lib
  from scansnap_jax.experiment import figures
  from scansnap_jax.experiment import intervals

_FACTORED = ("low rank", "Monarch")
_CHOOSING = ("Deja Vu", "oracle")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MonarchConfig:
  """What should an MLP read less of: Monarch's slices, rank, or neurons?

  Attributes:
    model: Folder of a checkpoint; none trains a small model.
    corpus: Its text.
    seed: Random seed of the model that is trained, of texts and of predictors.
    shares: Shares of the MLPs' weights that a token reads.
    blocks: Blocks of a Monarch matrix.
    num_layers: Layers of the model that is trained.
    width: Size of its residual stream, a multiple of 16; it has four times as
      many neurons.
    num_steps: Steps of its training.
    seq_len: Tokens of a text.
    batch_size: Texts of a step.
    rate: Learning rate of its training.
    num_tune: Steps that factors are trained after the projection; 0 is none.
    tune_rate: Their learning rate.
    num_texts: Texts that losses are of.
    num_capture: Texts that predictors learn from, 2 or more.
    predictor_rank: Rank of a predictor.
    predictor_steps: Steps of its training.
  """

  model: str = ""
  corpus: str = "tinyshakespeare"
  seed: int = 0
  shares: tuple[float, ...] = (0.3, 0.5, 0.7)
  blocks: int = 4
  num_layers: int = 3
  width: int = 64
  num_steps: int = 400
  seq_len: int = 96
  batch_size: int = 16
  rate: float = 3e-3
  num_tune: int = 60
  tune_rate: float = 1e-3
  num_texts: int = 12
  num_capture: int = 48
  predictor_rank: int = 8
  predictor_steps: int = 400

  def __post_init__(self):
    require.seeds("seed", self.seed)
    for name in ("num_texts", "num_capture"):  # Intervals need two.
      require.at_least(name, getattr(self, name), 2)
    for name in ("num_layers", "num_steps", "batch_size", "predictor_rank"):
      require.at_least(name, getattr(self, name), 1)
    require.at_least("blocks", self.blocks, 2)
    require.at_least("seq_len", self.seq_len, 4)
    for name in ("num_tune", "predictor_steps"):
      require.at_least(name, getattr(self, name), 0)
    for name in ("rate", "tune_rate"):
      require.positive(name, getattr(self, name))
    settings_lib.require_multiple("width", self.width, 16)
    settings_lib.require_several("shares", self.shares)
    if max(self.shares) > 1:
      raise errors.UserError(f"shares={self.shares} must not be above 1.")


def measure(
    config: MonarchConfig, *, part: parts.Part | None = None
) -> dict[str, Any]:
  """Measures every way at every share.

  Args:
    config: Sizes.
    part: Keeps what is done.

  Returns:
    "rows", a way at a share each: "bytes" that it reads of the MLPs' weights,
    "perplexity" and "loss above dense", an interval over texts; "dense"
    perplexity; "apart", by pair of ways, intervals of the first's loss above
    the second's at each share; "off", the largest relative difference of a
    squared error and its discarded singular values; "claims" and "finding".
  """
  part = part or parts.at_once
  found = part("all", lambda: _measured(config))
  table = _claims(found)
  return {**found, "claims": table, "finding": claims.finding(table)}


def _measured(config: MonarchConfig) -> dict[str, Any]:
  subject, text = _subject(config)
  dense = subject.losses(subject.params)
  losses, rows, off = {}, [], 0.0
  learned = subject.predict(
      next(_texts(config, text.train, config.num_capture, 3)),
      contextual_config.PredictorConfig(
          rank=config.predictor_rank,
          head_rank=1,
          num_steps=config.predictor_steps,
          seed=config.seed,
      ),
      float(np.median(config.shares)),
  )
  for share in config.shares:
    rank = _rank(config, subject, share)
    num_weights = rank * _per_rank(config, subject)
    at_share, more = _factored(config, subject, text, rank)
    off = max(off, more)
    chosen = _chosen(config, subject, num_weights, learned)
    for name, (values, read) in {**at_share, **chosen}.items():
      losses.setdefault(name, []).append(values)
      rows.append({
          "way": name,
          "bytes": read / subject.shape.weights,
          "perplexity": float(np.exp(values.mean())),
          "loss above dense": intervals.interval(values - dense),
      })
  tuned: dict[str, Any] = {}
  if config.num_tune:
    more = subject.losses(_tune(config, subject, text))
    tuned["loss of the tuned dense model above dense"] = intervals.interval(
        more - dense
    )
  return {
      **tuned,
      "dense": float(np.exp(dense.mean())),
      "num_texts": config.num_texts,
      "rows": rows,
      "off": off,
      "apart": _apart(losses),
      "shares": [
          _rank(config, subject, share)
          * _per_rank(config, subject)
          / subject.shape.weights
          for share in config.shares
      ],
  }


def _subject(config: MonarchConfig) -> tuple[compressed_mlps.Compressed, Any]:
  text = corpus_lib.load(config.corpus, tokenizer=config.model or "bytes")
  tests = next(_texts(config, text.valid, config.num_texts, 1))
  if config.model:
    shape, params = pretrained.load(config.model)
    model = models.Transformer(shape, implementation="xla")
    return compressed_mlps.Compressed(model, params, tests), text
  heads = config.width // 16
  shape = configs.TransformerConfig(
      vocab_size=text.tokenizer.vocab_size,
      num_layers=config.num_layers,
      embed_dim=config.width,
      num_heads=heads,
      num_kv_heads=heads,
      head_dim=16,
      hidden_dim=4 * config.width,
      activation="relu",
      use_gated_mlp=False,
  )
  model = models.Transformer(shape, implementation="xla")
  draw = once.jit(lambda key: model.init(key, tests[:1, :2]))
  params = draw(jax.random.key(config.seed))["params"]
  batches = _texts(config, text.train, config.batch_size, 2, config.num_steps)
  params, _ = distillation.train(model, params, batches, config.rate)
  return compressed_mlps.Compressed(model, params, tests), text


def _texts(
    config: MonarchConfig,
    ids: np.ndarray,
    num_texts: int,
    stream: int,
    num: int = 1,
) -> Iterator[jax.Array]:
  """Draws `num` batches of texts of a split; a stream is one sequence."""
  rng = np.random.default_rng((config.seed, stream))
  length = config.seq_len + 1
  if len(ids) <= length:
    raise errors.UserError(
        f"The corpus has {len(ids)} tokens in this split, less than a text of"
        f" seq_len={config.seq_len}."
    )
  for _ in range(num):
    starts = rng.integers(0, len(ids) - length, num_texts)
    rows = np.stack([ids[start : start + length] for start in starts])
    yield jnp.asarray(rows, jnp.int32)


def _per_rank(
    config: MonarchConfig, subject: compressed_mlps.Compressed
) -> int:
  """Weights of an MLP for each rank of its slices."""
  shape = subject.shape
  matrix = projections.Monarch(blocks=config.blocks, rank=1).num_params(
      shape.embed_dim, shape.hidden_dim
  )
  return (shape.num_inner + 1) * matrix


def _rank(
    config: MonarchConfig, subject: compressed_mlps.Compressed, share: float
) -> int:
  """Of slices, as a share of the weights allows."""
  each = _per_rank(config, subject)
  rank = int(share * subject.shape.weights / each)
  if rank < 1:
    raise errors.UserError(
        f"share={share} of an MLP's weights is less than the"
        f" {each / subject.shape.weights:.3g} of slices of rank 1 in"
        f" blocks={config.blocks}."
    )
  return rank


# Losses of texts, and weights of an MLP that a token reads.
_Ways = dict[str, tuple[Any, float]]


def _factored(
    config: MonarchConfig,
    subject: compressed_mlps.Compressed,
    text: Any,
    rank: int,
) -> tuple[_Ways, float]:
  """Both kinds of factors, of one number of weights, projected and tuned."""
  found: _Ways = {}
  off = 0.0
  num_weights = float(rank * _per_rank(config, subject))
  # A matrix of rank b r has as many weights as one of b blocks and rank r.
  sizes = ((1, config.blocks * rank), (config.blocks, rank))
  for name, (blocks, each) in zip(_FACTORED, sizes, strict=True):
    shape, params, errors_by_path = subject.projected(blocks, each)
    off = max(off, _off(subject.params, params, errors_by_path))
    found[name] = subject.losses(params), num_weights
    if config.num_tune:
      params = _tune(config, subject, text, (shape, params))
      found[f"{name}, tuned"] = subject.losses(params), num_weights
  return found, off


def _tune(
    config: MonarchConfig,
    subject: compressed_mlps.Compressed,
    text: Any,
    factored: Any = None,
) -> Any:
  """Trains (config, params), or the dense model, on other text."""
  shape, params = factored or (subject.model.config, subject.params)
  batches = _texts(config, text.train, config.batch_size, 4, config.num_tune)
  return subject.tuned(shape, params, batches, config.tune_rate)


def _off(before: Any, after: Any, errors_by_path: dict[str, float]) -> float:
  """Largest difference of |M - A|^2 and what was discarded, over |A|^2."""
  largest = 0.0
  for path, error in errors_by_path.items():
    layer, of, name = path.split("/")
    module = after[layer][of][name]
    right, left = (np.asarray(module[k], np.float64) for k in monarch.FACTORS)
    made = np.einsum("apjr,jars->apsj", right, left)
    old = np.asarray(before[layer][of][name]["kernel"], np.float64)
    change = np.sum(np.square(made.reshape(old.shape) - old))
    size = np.sum(np.square(old))
    largest = max(largest, abs(float(change / size) - error**2))
  return largest


def _chosen(
    config: MonarchConfig,
    subject: compressed_mlps.Compressed,
    num_weights: int,
    learned: Any,
) -> _Ways:
  """Predicted and true neurons, of no more weights."""
  predicted = unit_rules.Predicted(
      rank=config.predictor_rank, num_units=subject.shape.hidden_dim
  )
  found: _Ways = {}
  rules = (predicted, unit_rules.Oracle())
  for name, rule in zip(_CHOOSING, rules, strict=True):
    num = subject.num_neurons(num_weights, rule)
    if num < 1:
      raise errors.UserError(
          f"predictor_rank={config.predictor_rank} leaves no weights to"
          " neurons: give a smaller one, or larger shares."
      )
    num = min(num, subject.shape.hidden_dim)
    kept = unit_rules.Kept(num / subject.shape.hidden_dim)
    read = float(rule.weights_read(subject.shape, kept))
    found[name] = subject.with_neurons(rule, num, learned), read
  return found


_PAIRS = (
    ("low rank", "Monarch"),
    ("low rank, tuned", "Monarch, tuned"),
    ("Monarch", "Deja Vu"),
    ("Monarch, tuned", "Deja Vu"),
)


def _apart(losses: dict[str, list[Any]]) -> dict[str, list[dict[str, Any]]]:
  return {
      f"{one} - {other}": [
          intervals.interval(a - b)
          for a, b in zip(losses[one], losses[other], strict=True)
      ]
      for one, other in _PAIRS
      if one in losses and other in losses
  }


def _claims(found: dict[str, Any]) -> list[claims.Row]:
  off = found["off"]
  rows = [
      claims.row(
          "the squared error of a projection is that of the singular values"
          " left out",
          "within 1e-5 of the matrix's square",
          f"{off:.1e}",
          off < 1e-5,
      )
  ]
  for one, other in _PAIRS:
    gaps = found["apart"].get(f"{one} - {other}")
    if gaps is not None:
      rows.append(_loses_less(one, other, found["shares"], gaps))
  return rows


def _loses_less(
    one: str, other: str, shares: list[float], gaps: list[dict[str, Any]]
) -> claims.Row:
  told = "; ".join(
      f"{share:.3g}: {intervals.text(gap)}"
      for share, gap in zip(shares, gaps, strict=True)
  )
  return claims.row(
      f"{other} loses less than {one} at equal bytes",
      "gaps whose intervals over texts are above 0 at every share",
      f"{told} nats",
      all(gap["low"] > 0 for gap in gaps),
  )


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws loss above the dense model's against bytes."""
  names = list(dict.fromkeys(row["way"] for row in summary["rows"]))
  looks = drawing.looks_of([*_FACTORED, *_CHOOSING])
  with figures.style():
    figure = figures.make_figure(figures.COLUMN_WIDTH, 3.0)
    axes = figure.subplots()
    for name in names:
      rows = [row for row in summary["rows"] if row["way"] == name]
      line = "-" if name in _FACTORED else ":"
      if name in _CHOOSING:
        line = (0, (5, 1.2))
      look = looks[name.partition(",")[0]]._replace(linestyle=line)
      values = drawing.points([row["loss above dense"] for row in rows])
      drawing.draw_points(
          axes, [row["bytes"] for row in rows], values, look, name
      )
    axes.axhline(0, color="0.5", linewidth=0.8)
    tuned = summary.get("loss of the tuned dense model above dense")
    if tuned:
      axes.axhline(tuned["mean"], color="0.5", linestyle=":", linewidth=0.8)
    axes.set(
        xlabel="share of the MLPs' weights that a token reads",
        ylabel="loss above the dense model's (nats)",
    )
    axes.set_yscale("symlog", linthresh=0.1)
    figures.put_legend_above(figure, figures.legend_entries(axes))
  return figure


STUDY = study_lib.Study(
    title="MLPs that read less: Monarch, low rank, Deja Vu",
    config=MonarchConfig(),
    measure=study_lib.in_parts("monarch", measure),
    draw=draw,
    caption=(
        "Loss of held-out texts above that of the dense model, where MLPs read"
        " a share of their weights: mean over texts and its 95 % interval"
        " (Student's t). Tuned: trained on other text after the projection; the"
        " dotted grey line is the dense model, trained so too. Deja Vu's bytes"
        " are those of its predictor too; the oracle has none."
    ),
    report_title="Attention systems",
)
