"""The model of the study `monarch`, and every way to read less of its MLPs."""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
from typing import Any, NamedTuple

from etils import epy

from joma.studies import settings as settings_lib
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require

with epy.lazy_imports():  # --help imports this file, and waits for no jax.
  import jax
  import jax.numpy as jnp
  import numpy as np

  from joma.inference.sparsity import contextual_config
  from joma.inference.sparsity import unit_rules
  from joma.studies import once
  from joma.studies.systems.projections import compressed_mlps
  from joma.systems.reuse import distillation
  from joma.transformer import config as configs
  from joma.transformer import model as models
  from joma.transformer.hf import pretrained
  from joma.transformer.layers import monarch
  from joma.transformer.layers import projections
  from joma.transformer.text import corpus as corpus_lib

FACTORED = ("low rank", "Monarch")
CHOOSING = ("Deja Vu", "oracle")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MonarchConfig:
  """What should an MLP read less of: Monarch's slices, rank, or neurons?

  Attributes:
    model: Folder of a checkpoint, or its name on Hugging Face, as
      org/name@revision; none trains a small model.
    corpus: Text that models are trained on and asked about.
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
    tune_rate: Learning rate of factors after the projection.
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


class Made(NamedTuple):
  """What all shares have in common.

  Attributes:
    subject: The dense model.
    text: The corpus.
    dense: Its losses [B].
    learned: Predictors.
  """

  subject: compressed_mlps.Compressed
  text: Any
  dense: Any
  learned: Any


def make(config: MonarchConfig) -> Made:
  """Trains or loads the model, and trains predictors of its neurons."""
  subject, text = _subject(config)
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
  return Made(subject, text, subject.losses(subject.params), learned)


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


def per_rank(config: MonarchConfig, subject: compressed_mlps.Compressed) -> int:
  """Weights of an MLP for each rank of its slices."""
  shape = subject.shape
  matrix = projections.Monarch(blocks=config.blocks, rank=1).num_params(
      shape.embed_dim, shape.hidden_dim
  )
  return (shape.num_inner + 1) * matrix


def rank_of(
    config: MonarchConfig, subject: compressed_mlps.Compressed, share: float
) -> int:
  """Of slices, as a share of the weights allows."""
  each = per_rank(config, subject)
  rank = int(share * subject.shape.weights / each)
  if rank < 1:
    raise errors.UserError(
        f"share={share} of an MLP's weights is less than the"
        f" {each / subject.shape.weights:.3g} of slices of rank 1 in"
        f" blocks={config.blocks}."
    )
  return rank


# Losses of texts, and weights of an MLP that a token reads.
Ways = dict[str, tuple[Any, float]]


def factored(
    config: MonarchConfig,
    subject: compressed_mlps.Compressed,
    text: Any,
    rank: int,
) -> tuple[Ways, float]:
  """Both kinds of factors, of one number of weights, projected and tuned."""
  found: Ways = {}
  off = 0.0
  num_weights = float(rank * per_rank(config, subject))
  # A matrix of rank b r has as many weights as one of b blocks and rank r.
  sizes = ((1, config.blocks * rank), (config.blocks, rank))
  for name, (blocks, each) in zip(FACTORED, sizes, strict=True):
    shape, params, errors_by_path = subject.projected(blocks, each)
    off = max(off, _off(subject.params, params, errors_by_path))
    found[name] = subject.losses(params), num_weights
    if config.num_tune:
      params = tune(config, subject, text, (shape, params))
      found[f"{name}, tuned"] = subject.losses(params), num_weights
  return found, off


def tune(
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


def chosen(
    config: MonarchConfig,
    subject: compressed_mlps.Compressed,
    num_weights: int,
    learned: Any,
) -> Ways:
  """Predicted and true neurons, of no more weights."""
  predicted = unit_rules.Predicted(
      rank=config.predictor_rank, num_units=subject.shape.hidden_dim
  )
  found: Ways = {}
  rules = (predicted, unit_rules.Oracle())
  for name, rule in zip(CHOOSING, rules, strict=True):
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
