"""Do a text's statistics name what the layers of a checkpoint attend to?

The last rung of `bridge_ladder`: nothing is trained. P(l|n) and the velocity of
Scan & Snap's attention (https://arxiv.org/abs/2305.16380, Lemma 1) are taken
from the train split of a text, and asked, layer by layer, for the heavy hitters
of a model on the validation split: the places of the first half of a text to
which the second half attends most. The first places are no candidates, as they
are sinks whatever they hold. Beside a checkpoint (`--bridge_checkpoint.model`)
stands the same model with untrained parameters, whose attention knows nothing
of the text; without one, two untrained layers are all there is.

Letters: B texts, C candidates, L layers, N heads, T tokens, V token types.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from etils import epy

from joma.studies import study as study_lib
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require
from scansnap_jax.experiment.venues import edges

with epy.lazy_imports():  # --help imports this file, and waits for no jax.
  import jax
  import jaxtyping
  from matplotlib import figure as mpl_figure
  import numpy as np

  from joma.inference.bridge import recall
  from joma.inference.bridge import text as bridge_text
  from joma.inference.bridge import theory
  from joma.studies import claims
  from joma.studies import drawing
  from joma.studies import parts
  from joma.studies.systems.bridge import predictors
  from joma.transformer import config as configs
  from joma.transformer import model as models
  from joma.transformer.hf import pretrained
  from joma.transformer.text import corpus as corpus_lib
  from scansnap_jax.experiment import figures
  from scansnap_jax.experiment import intervals

_SHOWN = ("velocity", "frequency", "ratio", "type", "running mean", "recency")
# More token ids than any vocabulary has.
_MOST_IDS = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class BridgeCheckpointConfig:
  """Do a text's statistics name what a checkpoint's layers attend to?

  Attributes:
    model: Folder of a checkpoint, or its name on Hugging Face, as
      org/name@revision; where none is given, two untrained layers are read.
    corpus: Text whose train split gives the statistics, and whose validation
      split is read.
    num_texts: Texts that are measured.
    num_calibration: Texts of the train split that tell what types get.
    length: Tokens of a text.
    num_sinks: First places that are no candidates.
    num_windows: Stretches of the train split that statistics are of.
    vocab_size: Most frequent types that have statistics of their own; all
      others share theirs.
    budget: Share of the candidates that are heavy hitters.
  """

  model: str = ""
  corpus: str = "tinyshakespeare"
  num_texts: int = 32
  num_calibration: int = 64
  length: int = 128
  num_sinks: int = 4
  num_windows: int = 2048
  vocab_size: int = 2048
  budget: float = 0.25

  def __post_init__(self):
    for name in ("num_texts", "num_calibration", "num_windows"):
      require.between(name, getattr(self, name), 2, 10**6)
    require.between("length", self.length, 8, 4096)
    require.between("num_sinks", self.num_sinks, 0, self.length // 2 - 2)
    require.between("vocab_size", self.vocab_size, 2, 8192)
    if not 0 < self.budget < 1:
      raise errors.UserError(f"budget must lie in (0, 1), got {self.budget}.")

  @property
  def num_candidates(self) -> int:
    """C."""
    return self.length // 2 - self.num_sinks

  @property
  def num_kept(self) -> int:
    """Heavy hitters of a text, in each head."""
    return recall.count_kept(self.budget, self.num_candidates)


def measure(
    config: BridgeCheckpointConfig, *, part: parts.Part | None = None
) -> dict[str, Any]:
  """Asks every predictor, layer by layer.

  Args:
    config: Sizes.
    part: Keeps what is done.

  Returns:
    "rows", by model ("checkpoint" where one is given, and "untrained"): recalls
    [B, L] of each predictor, means over heads; "table", a row a predictor, with
    means over layers as intervals over texts; "chance", "claims" and "finding".
  """
  part = part or parts.at_once
  names = ["checkpoint", "untrained"] if config.model else ["untrained"]
  rows = {
      name: part(name, lambda name=name: _measure(config, name == "checkpoint"))
      for name in names
  }
  table = [
      {"model": name, "predictor": predictor, **_over_texts(found[predictor])}
      for name, found in rows.items()
      for predictor in found
  ]
  chance = config.num_kept / config.num_candidates
  rated = _claims(rows, chance)
  return {
      "rows": rows,
      "table": table,
      "chance": chance,
      "claims": rated,
      "finding": claims.finding(rated),
  }


def _over_texts(recalls: Any) -> dict[str, float]:
  """A recall's mean over layers, and its interval over texts."""
  of_texts = np.asarray(recalls).mean(axis=1)
  return intervals.interval(of_texts, least=0, most=1)


def _claims(
    rows: Mapping[str, Mapping[str, Any]], chance: float
) -> list[claims.Row]:
  blind = _over_texts(rows["untrained"]["velocity"])
  rated = [
      claims.row(
          "untrained: velocity names what chance does",
          f"within .02 of chance, {chance:.3f}",
          intervals.text(blind),
          abs(blind["mean"] - chance) < 0.02,
      )
  ]
  if "checkpoint" in rows:
    for pair in (
        ("velocity", "frequency"),
        ("discriminancy", "frequency"),
        ("velocity", "velocity by type"),
        ("velocity", "recency"),
        ("type", "frequency"),
    ):
      rated.append(_above(rows["checkpoint"], *pair))
  return rated


def _above(found: Mapping[str, Any], name: str, other: str) -> claims.Row:
  gain = np.asarray(found[name]) - np.asarray(found[other])
  told = intervals.interval(gain.mean(axis=1))
  layers = intervals.interval(gain)["low"] > 0
  return claims.row(
      f"{name} names more heavy hitters than {other}, mean over layers",
      "a difference above 0, text by text",
      f"{intervals.text(told)}; in {layers.sum()} of {layers.size} layers",
      told["low"] > 0,
  )


def _measure(
    config: BridgeCheckpointConfig, is_trained: bool
) -> dict[str, list[list[float]]]:
  """Recalls [B, L] by predictor."""
  corpus = corpus_lib.load(config.corpus, tokenizer=config.model or "bytes")
  model, params = _load(config, corpus.vocab_size, is_trained)
  cut = lambda tokens, number, split: bridge_text.cut(
      tokens, config.length, number, split
  )
  texts = cut(corpus.valid, config.num_texts, "validation")
  calibration = cut(corpus.train, config.num_calibration, "training")
  mass, running = bridge_text.read(model, params, texts)
  calibrated, _ = bridge_text.read(model, params, calibration)
  places = slice(config.num_sinks, config.length // 2)
  scores = _statistics_of(config, corpus.train, texts, places)
  ids = _compact(config, corpus.train)
  means = recall.mean_by_type(
      calibrated[..., places], ids[calibration[:, places]], config.vocab_size
  )
  ages = np.arange(config.length // 2, 0, -1)
  scores = {name: score[:, None] for name, score in scores.items()} | {
      "type": means[:, ids[texts[:, places]]].swapaxes(0, 1),
      "running mean": (running / ages)[..., places],
      "recency": np.arange(config.num_candidates, dtype=float)[None, None],
  }
  shape = (len(texts), model.config.num_layers, -1)
  return {
      name: (
          recall.recall(score, mass[..., places], config.num_kept)
          .reshape(shape)
          .mean(axis=2)
          .tolist()
      )
      for name, score in scores.items()
  }


def _load(
    config: BridgeCheckpointConfig, vocab_size: int, is_trained: bool
) -> tuple[models.Transformer, Any]:
  if config.model:
    shape, params = pretrained.load(config.model)
  else:
    shape, params = (
        configs.TransformerConfig(
            vocab_size=vocab_size,
            num_layers=2,
            embed_dim=64,
            num_heads=4,
            num_kv_heads=4,
            head_dim=16,
            hidden_dim=128,
        ),
        None,
    )
  model = models.Transformer(shape, implementation="xla")
  if not is_trained:
    tokens = np.zeros((1, config.length), np.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
  return model, params


def _compact(
    config: BridgeCheckpointConfig, train: jaxtyping.Integer[np.ndarray, "_"]
) -> jaxtyping.Int[np.ndarray, "_"]:
  """Maps token ids to types: the most frequent, and one for all others."""
  count = np.bincount(train, minlength=int(train.max()) + 1)
  kept = np.argsort(-count, kind="stable")[: config.vocab_size - 1]
  ids = np.full(_MOST_IDS, config.vocab_size - 1)
  ids[kept] = np.arange(len(kept))
  return ids


def _statistics_of(
    config: BridgeCheckpointConfig,
    train: jaxtyping.Integer[np.ndarray, "_"],
    texts: jaxtyping.Int[np.ndarray, "B T"],
    places: slice,
) -> dict[str, jaxtyping.Float[np.ndarray, "B C"]]:
  """What statistics of the train split say of the candidates of texts."""
  ids = _compact(config, train)
  windows = bridge_text.cut(
      train, config.length, config.num_windows, "training"
  )
  found = theory.growth(ids[windows], config.vocab_size)
  count = np.bincount(ids[train], minlength=config.vocab_size)
  middle = config.length // 2
  ratios = predictors.ratios(
      ids[windows[:, :middle]], ids[windows[:, middle]], config.vocab_size
  )
  candidates, queries = ids[texts[:, places]], ids[texts[:, middle:]]
  by_type = {
      "velocity by type": theory.type_scores(found),
      "discriminancy": theory.discriminancy(found),
      "frequency": count / count.sum(),
      "minus frequency": -count / count.sum(),
      "ratio": ratios["ratio"],
      "log ratio": ratios["log_ratio"],
  }
  asked = [
      found.velocity[query[:, None], candidate[None]].mean(axis=0)
      for query, candidate in zip(queries, candidates, strict=True)
  ]
  known = {name: values[candidates] for name, values in by_type.items()}
  return {"velocity": np.stack(asked), **known}


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws recall against the layer, a panel a model."""
  rows = summary["rows"]
  looks = drawing.looks_of(_SHOWN)
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 2.9)
    panels = figure.subplots(1, len(rows), sharey=True, squeeze=False)[0]
    for axes, (name, found) in zip(panels, rows.items(), strict=True):
      for predictor, look in looks.items():
        curve = np.asarray(found[predictor])
        layers = np.arange(curve.shape[1])
        band = intervals.interval(curve, least=0, most=1)
        drawing.draw_interval(axes, layers, band, look, predictor)
      axes.axhline(summary["chance"], color="black", ls=":", lw=0.8)
      axes.set(xlabel="layer", ylim=(0, 1), title=name)
      edges.count_layers(axes, np.shape(found[_SHOWN[0]])[1])
    panels[0].set_ylabel("recall of the heavy hitters")
    figures.put_legend_above(figure, figures.legend_entries(panels[0]))
  return figure


STUDY = study_lib.Study(
    title="Co-occurrence and the layers of a checkpoint",
    config=BridgeCheckpointConfig(),
    smoke=dict(
        num_texts=2, num_calibration=2, length=16, num_windows=8, vocab_size=64
    ),
    measure=study_lib.in_parts("bridge_checkpoint", measure),
    draw=draw,
    caption=(
        "Recall of the heavy hitters of each layer, mean over its heads, by"
        " what predicts them: the velocity of Scan & Snap's attention for the"
        " queries that ask, frequency and P(l|n)/P(l) from the train split"
        " alone; and, from the model's own attention, what a type gets on other"
        " texts and H2O's running mean; and the newest tokens. Dotted: chance."
        " Mean over texts and its 95 % interval (Student's t)."
    ),
    report_title="From co-occurrence to heavy hitters",
)
