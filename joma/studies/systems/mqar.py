"""Which mixers recall pairs, how many, and from how far?

A text is pairs of a key and its value, then the same pairs again and again, in
any order, of which each key is to be answered by its value: associative recall
of many pairs (https://arxiv.org/abs/2312.04927). Softmax keeps every pair; a
state of one size must hold them all, and the gated delta rule
(https://arxiv.org/abs/2412.06464) replaces what it holds at a key where linear
attention adds to it. A plain model of two layers is slow to form the circuit:
each is trained with short convolutions too, and recall is shown along training,
not at one budget alone. A gated convolution of L layers reads no farther back
than 22 L tokens.

A step has texts of few and of many pairs side by side, all of one length, and
its loss counts each kind alike: what is learned of few helps with many.
"""

from __future__ import annotations

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

  from joma.studies import claims
  from joma.studies import drawing
  from joma.studies import parts
  from joma.studies import training
  from joma.studies.systems import mqar_claims
  from joma.studies.systems import mqar_texts
  from joma.transformer import config as configs
  from scansnap_jax.experiment import figures
  from scansnap_jax.experiment import intervals

# Of two heads none may last with decays as the paper draws them, for many.
_SLOW = "gdn:start=0.8"
# Layers, and the systems of each.
MODELS: dict[str, tuple[int, tuple[str, ...]]] = {
    "softmax + conv": (2, ("convolved:width=4",)),
    "gdn": (2, (_SLOW,)),
    "3 gdn + 1 softmax": (4, (_SLOW, _SLOW, _SLOW, "softmax")),
    "3 gdn + 1 softmax + conv": (
        4,
        (_SLOW, _SLOW, _SLOW, "convolved:width=4"),
    ),
    "lightning + conv": (2, ("lightning+convolved:width=4",)),
    "gated_conv": (2, ("gated_conv",)),
    "softmax": (2, ()),
    "lightning": (2, ("lightning",)),
}
_REACH = 22  # Tokens that a layer of `gated_conv` reads before its own.


@dataclasses.dataclass(frozen=True, kw_only=True)
class MqarConfig:
  """Which mixers recall pairs, how many, and from how far?

  Attributes:
    models: Which are trained.
    num_seeds: Runs of each model.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    num_steps: Most steps of a run, a multiple of num_records; runs end sooner
      where they answer target of the keys of each number of pairs.
    num_records: Records of each run.
    target: Share of right answers at which a run ends.
    batch_size: Texts of a step, as many of each number of pairs.
    seq_len: Tokens of a text, even.
    num_pairs: Pairs of a text: one or more numbers, rising.
    num_keys: Keys that there are.
    num_values: Values that there are.
    width: Width of the residual stream, of two heads.
    rate: Highest learning rate.
    num_test: Texts of each run and number of pairs by which recall is told by
      distance.
  """

  models: tuple[str, ...] = tuple(MODELS)
  num_seeds: int = 3
  first_seed: int = 0
  num_steps: int = 1500
  num_records: int = 30
  target: float = 0.985
  batch_size: int = 8
  seq_len: int = 96
  num_pairs: tuple[int, ...] = (4, 8, 16, 32)
  num_keys: int = 32
  num_values: int = 32
  width: int = 32
  rate: float = 1e-2
  num_test: int = 128

  def __post_init__(self):
    settings_lib.check_trained(self, "batch_size", "num_test")
    settings_lib.require_choices("models", self.models, tuple(MODELS))
    require.at_least("width", self.width, 4)
    require.positive("target", self.target)
    if not self.num_pairs or list(self.num_pairs) != sorted(
        {max(1, number) for number in self.num_pairs}
    ):
      raise errors.UserError(
          "num_pairs must be one or more rising numbers, each 1 or more, got"
          f" {','.join(map(str, self.num_pairs)) or 'none'}."
      )
    most = self.num_pairs[-1]
    for name in ("num_keys", "num_values"):
      require.between(name, getattr(self, name), most, 10**4)
    settings_lib.require_multiple(
        "batch_size", self.batch_size, len(self.num_pairs)
    )
    if self.seq_len % 2 or self.seq_len <= 2 * most:
      raise errors.UserError(
          "seq_len must be even and more than two tokens a pair of"
          f" num_pairs={most}, got {self.seq_len}."
      )


def _key_size(config: MqarConfig) -> int:
  """Channels of a head: even, for rotary positions."""
  return config.width // 2 // 2 * 2


def learner(config: MqarConfig, name: str) -> mqar_texts.PairsLearner:
  """A model of `MODELS` and its task."""
  num_layers, attention = MODELS[name]
  model = configs.TransformerConfig(
      vocab_size=config.num_keys + config.num_values,
      num_layers=num_layers,
      embed_dim=config.width,
      num_heads=2,
      num_kv_heads=2,
      head_dim=_key_size(config),
      hidden_dim=2 * config.width,
      max_len=config.seq_len,
      attention=attention,
  )
  sizes = ("seq_len", "num_pairs", "num_keys", "num_values")
  task = mqar_texts.Pairs(**{name: getattr(config, name) for name in sizes})
  return mqar_texts.PairsLearner(
      model=model,
      task=task,
      batch_size=config.batch_size,
      implementation="xla",
  )


def measure(
    config: MqarConfig, *, part: parts.Part | None = None
) -> dict[str, Any]:
  """Trains the models.

  Args:
    config: Sizes.
    part: Keeps what is done.

  Returns:
    "rows", of each model: "pairs", of each number of pairs "accuracy" of new
    texts, "near" and "far", recall of keys last told within 44 tokens and more
    than 45 back (None where no key is), intervals over seeds, with each seed's
    "accuracies", and "scores" along training; "first" steps above .9 of all
    numbers together and how many seeds "reached" it, the "num_steps" of each;
    "steps", "num_pairs", "claims" and "finding".
  """
  part = part or parts.at_once
  rows = {
      name: part(name, lambda n=name: _run(config, n)) for name in config.models
  }
  told = mqar_claims.rows(config.num_pairs, _key_size(config), rows)
  return {
      "num_seeds": config.num_seeds,
      "num_pairs": config.num_pairs,
      "steps": rows[config.models[0]]["steps"],
      "rows": rows,
      "claims": told,
      "finding": claims.finding(told),
  }


def _run(config: MqarConfig, name: str) -> dict[str, Any]:
  problem, seeds = learner(config, name), settings_lib.seeds(config)
  trained = training.train(
      problem,
      seeds,
      schedule=training.Schedule(
          num_steps=config.num_steps,
          num_records=config.num_records,
          target_score=config.target,
      ),
      rate=config.rate,
  )
  share = lambda values: intervals.interval(values, least=0, most=1)
  of_pairs, curves = [], {"loss": trained.losses.mean(axis=0).tolist()}
  for kind, num_pairs in enumerate(config.num_pairs):
    look = jax.jit(_by_distance, static_argnums=(0, 3, 4))
    # No key of training.
    keys = [jax.random.key(seed + 2**30) for seed in seeds]
    found = [
        np.array(
            look(
                problem, trained.params_of(run), key, config.num_test, num_pairs
            )
        )
        for run, key in enumerate(keys)
    ]
    whole, near, far = np.stack(found, axis=1)
    scores = trained.scores[:, :, kind]
    curves[f"score of {num_pairs}"] = scores.mean(axis=0).tolist()
    of_pairs.append({
        "accuracy": share(whole),
        "accuracies": whole,
        "near": share(near),
        "far": share(far) if (far >= 0).all() else None,
        "scores": share(scores),
    })
  mean = trained._replace(scores=trained.scores.mean(axis=2))
  first, reached = training.first_above(mean, 0.9)
  return {
      "pairs": of_pairs,
      "first": first,
      "reached": reached,
      "num_steps": trained.num_steps,
      "steps": trained.steps,
      "curves": curves,
  }


def _by_distance(
    problem: mqar_texts.PairsLearner,
    params: Any,
    key: jax.Array,
    num_texts: int,
    num_pairs: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Recall of all keys, of those within 44 tokens, and beyond 45, or -1."""
  found = problem.task.draw_kind(key, num_texts, num_pairs)
  logits: Any = problem.transformer.apply({"params": params}, found.tokens)
  is_right = logits.argmax(axis=-1) == found.targets
  behind = mqar_texts.distances(found)
  is_near, is_far = behind <= 2 * _REACH, behind > 2 * _REACH + 1

  def mean(where: jax.Array) -> jax.Array:
    where = where & found.is_asked
    total = where.sum()
    share = (is_right & where).sum() / jnp.maximum(total, 1)
    return jnp.where(total > 0, share, -1.0)

  return mean(found.is_asked), mean(is_near), mean(is_far)


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws the share of right answers along training, by number of pairs."""
  numbers, look = summary["num_pairs"], drawing.looks_of(list(MODELS))
  steps = np.asarray(summary["steps"])
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 2.8)
    panels = figure.subplots(1, len(numbers), sharey=True, squeeze=False)[0]
    for kind, axes in enumerate(panels.tolist()):
      for name, row in summary["rows"].items():
        scores = row["pairs"][kind]["scores"]
        drawing.draw_interval(axes, steps, scores, look[name], name)
      axes.axhline(1 / numbers[kind], color="black", linestyle=":")
      axes.set(xlabel="step", title=f"{numbers[kind]} pairs", ylim=(0, 1.03))
    panels[0].set(ylabel="share of right answers")
    figures.put_legend_above(figure, figures.legend_entries(panels[0]))
  return figure


STUDY = study_lib.Study(
    title="Associative recall of mixers along training",
    config=MqarConfig(),
    smoke=dict(
        models=("softmax + conv", "gated_conv"),
        batch_size=4,
        seq_len=8,
        num_pairs=(1, 2),
        num_keys=4,
        num_values=4,
        width=8,
        num_test=4,
        num_seeds=2,
        num_steps=2,
        num_records=2,
    ),
    measure=study_lib.in_parts("mqar", measure),
    draw=draw,
    caption=(
        "Share of asked keys that are answered by their value, along training,"
        " by the number of pairs of a text; runs end above the target and stay"
        " there in the figure. Dotted: a guess among the values of the text."
        f" {study_lib.BANDS}"
    ),
    report_title="Attention systems",
)
