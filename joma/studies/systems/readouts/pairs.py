"""How much of a cross-encoder does a head over two vectors keep?

The text with the larger value beats the other: a relation that no dot product
of vectors of one encoder can hold, as it is the same both ways. A
cross-encoder, which reads both texts at once, learns it; two students with one
encoder for both texts are taught its scores (Distilled Sentence Embedding,
https://arxiv.org/abs/1908.05161), one with a pair head, one with a dot product.
What a candidate costs is counted of compiled programs.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from etils import epy

from joma.studies import settings as settings_lib
from joma.studies import study as study_lib
from scansnap_jax.experiment import require

with epy.lazy_imports():  # --help imports this file, and waits for no jax.
  import jax
  import jax.numpy as jnp
  from matplotlib import figure as mpl_figure
  import numpy as np

  from joma.studies import claims
  from joma.studies import drawing
  from joma.studies import once
  from joma.studies import parts
  from joma.studies import training
  from joma.studies.systems.subjects import pair_texts
  from scansnap_jax.experiment import intervals

MODELS = ("cross-encoder", "pair head", "dot product")
_KINDS: dict[str, Literal["features", "dot"]] = {
    "pair head": "features",
    "dot product": "dot",
}
_KEPT, _CANDIDATES, _LONGER = 0.9, 64, 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairsConfig:
  """How much of a cross-encoder does a head over two vectors keep?

  Attributes:
    num_seeds: Runs of each model.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    num_steps: Steps of a run, a multiple of num_records.
    num_records: Records of each run.
    batch_size: Pairs of a step.
    num_values: Values of texts.
    num_tokens: Tokens of a text.
    width: Width of the models, and of the vectors.
    rate: Highest learning rate.
    num_test: Pairs that answers are measured on.
  """

  num_seeds: int = 3
  first_seed: int = 0
  num_steps: int = 600
  num_records: int = 12
  batch_size: int = 64
  num_values: int = 16
  num_tokens: int = 6
  width: int = 32
  rate: float = 3e-3
  num_test: int = 1024

  def __post_init__(self):
    settings_lib.check_trained(self, "batch_size", "num_tokens", "num_test")
    require.at_least("num_values", self.num_values, 2)
    settings_lib.require_multiple("width", self.width, 4)


def measure(
    config: PairsConfig, *, part: parts.Part | None = None
) -> dict[str, Any]:
  """Trains the cross-encoder, and teaches both students.

  Args:
    config: Sizes.
    part: Keeps what is done.

  Returns:
    "rows" of each model: "answers" that are right, of every seed, and
    "scores" along training; "kept" of every seed, the share of the gain;
    "flops" of a candidate of num_tokens tokens and of four times as many;
    "steps", "guess", "claims" and "finding".
  """
  part = part or parts.at_once
  # In one part, as a student needs the parameters of its teacher.
  rows = part("models", lambda: _models(config))
  flops = part("flops", lambda: _flops(config))
  answers = {name: np.array(rows[name]["answers"]) for name in MODELS}
  cross, head, dot = (answers[name] for name in MODELS)
  # Without a gain nothing is kept of it.
  kept = (head - dot) / np.where(cross > dot, cross - dot, np.inf)
  told = _claims(answers, kept, flops)
  return {
      "rows": {name: rows[name] for name in MODELS},
      "kept": kept,
      "flops": flops,
      "steps": rows["steps"],
      "guess": 0.5,
      "claims": told,
      "finding": claims.finding(told),
  }


def _teacher(config: PairsConfig) -> pair_texts.CrossEncoder:
  order = pair_texts.Order(
      num_values=config.num_values, num_tokens=config.num_tokens
  )
  return pair_texts.CrossEncoder(
      order=order, batch_size=config.batch_size, width=config.width
  )


def _models(config: PairsConfig) -> dict[str, Any]:
  teacher = _teacher(config)
  taught = _trained(config, teacher)
  of_seed = {
      seed: taught.params_of(run)
      for run, seed in enumerate(settings_lib.seeds(config))
  }
  found = {MODELS[0]: _row(config, teacher, taught)}
  for name, kind in _KINDS.items():
    student = pair_texts.Student(teacher=teacher, taught=of_seed, kind=kind)
    found[name] = _row(config, student, _trained(config, student))
  curves = {name: np.mean(found[name]["along"], axis=0) for name in MODELS}
  return {
      **found,
      "steps": taught.steps,
      "curves": {name: curve.tolist() for name, curve in curves.items()},
  }


def _trained(config: PairsConfig, problem: Any) -> training.Trained:
  return training.train(
      problem,
      settings_lib.seeds(config),
      schedule=training.Schedule(
          num_steps=config.num_steps, num_records=config.num_records
      ),
      rate=config.rate,
  )


def _row(
    config: PairsConfig, problem: Any, trained: training.Trained
) -> dict[str, Any]:
  """Answers to new pairs, and along training."""
  order = _teacher(config).order
  pairs = order.draw(jax.random.key(10**6), config.num_test)

  def share(params: Any) -> jax.Array:
    score = problem.score(params, pairs.one, pairs.two)
    return ((score > 0) == pairs.beats).mean()

  run = once.jit(lambda params: jax.lax.map(share, params))
  return {
      "answers": np.asarray(run(jax.device_put(trained.params))),
      "along": trained.scores,
      "scores": intervals.interval(trained.scores, least=0, most=1),
  }


def _flops(config: PairsConfig) -> dict[str, list[float]]:
  """Of a candidate whose query is known, of texts and of longer ones."""
  found: dict[str, list[float]] = {name: [] for name in MODELS}
  for factor in (1, _LONGER):
    longer = dataclasses.replace(config, num_tokens=factor * config.num_tokens)
    teacher = _teacher(longer)
    params = jax.eval_shape(teacher.init, jax.random.key(0))
    text = jax.ShapeDtypeStruct((_CANDIDATES, longer.num_tokens), jnp.int32)
    found[MODELS[0]].append(_cost(teacher.score, params, text, text))
    # Vectors are made once a text, whoever asks.
    vector = jax.ShapeDtypeStruct((_CANDIDATES, config.width), jnp.float32)
    for name, kind in _KINDS.items():
      head = pair_texts.Student(teacher=teacher, taught={}, kind=kind).head
      params = jax.eval_shape(head.init, jax.random.key(0), vector, vector)
      found[name].append(_cost(head.apply, params, vector, vector))
  return found


def _cost(function: Any, *shapes: Any) -> float:
  cost: Any = jax.jit(function).lower(*shapes).compile().cost_analysis()
  return float(cost["flops"]) / _CANDIDATES


def _claims(
    answers: dict[str, np.ndarray],
    kept: np.ndarray,
    flops: dict[str, list[float]],
) -> list[claims.Row]:
  text = lambda x: intervals.text(intervals.interval(np.array(x)))
  cross, head, dot = (answers[name] for name in MODELS)
  (cross_short, cross_long), (short, long), _ = (flops[n] for n in MODELS)
  return [
      claims.row(
          "a cross-encoder learns which text beats which",
          "above .95, every seed",
          text(cross),
          cross.min() > 0.95,
      ),
      claims.row(
          "a dot product does not hold it, whatever is taught",
          "below .55, every seed",
          text(dot),
          dot.max() < 0.55,
      ),
      claims.row(
          "the pair head keeps the cross-encoder's gain over the dot product",
          f"{_KEPT} of it or more",
          f"{text(kept)}, with {text(head)} right",
          kept.mean() >= _KEPT,
      ),
      claims.row(
          "what a candidate costs the pair head does not depend on its length",
          "equal FLOPs, texts four times as long",
          f"{short:.0f} and {long:.0f}; the cross-encoder {cross_short:.0f} and"
          f" {cross_long:.0f}",
          short == long and cross_long > cross_short,
      ),
  ]


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws the share of right answers along training."""
  return drawing.draw_recall(summary, MODELS, 2.4)


STUDY = study_lib.Study(
    title="Pairs: what a head over two vectors keeps of a cross-encoder",
    config=PairsConfig(),
    smoke=dict(
        batch_size=2,
        num_values=3,
        num_tokens=2,
        width=4,
        num_test=4,
        num_seeds=2,
        num_steps=2,
        num_records=2,
    ),
    measure=study_lib.in_parts("pairs", measure),
    draw=draw,
    caption=(
        "Share of pairs whose winner is said right, along training of the"
        " cross-encoder and of two students that are taught its scores. Dotted:"
        f" a guess. {study_lib.BANDS}"
    ),
    report_title="Attention systems",
)
