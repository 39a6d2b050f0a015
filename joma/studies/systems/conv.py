"""Does one layer with convolved queries, keys and values recall pairs?

A text is pairs of a key and its value; a key that comes again is to be answered
by the value that it had. Attention finds the key by what it says, but the value
stands one token later: plain attention needs a layer that brings each key to
its value's place, and one that looks it up. A convolution of queries, keys and
values over the tokens just before does the first by itself (Primer,
https://arxiv.org/abs/2109.08668, and RCMHA convolve them so).

The figure shows the share of right answers along training, of one plain layer,
one with the convolutions and two plain layers.

Paper's settings: those of the system `convolved`.
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
  from joma.studies import texts
  from joma.studies import training
  from joma.transformer import config as configs
  from scansnap_jax.experiment import intervals

# Layers, and the systems of each.
MODELS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one plain layer": (1, ()),
    "one convolved layer": (1, ("convolved",)),
    "two plain layers": (2, ()),
}
_LEARNED = 0.9


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvConfig:
  """Does one layer with convolved queries, keys and values recall pairs?

  Attributes:
    num_seeds: Runs of each model.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    num_steps: Most steps of a run, a multiple of num_records; runs end sooner
      where they answer 97 of 100 keys.
    num_records: Records of each run.
    batch_size: Texts of a step.
    seq_len: Tokens of a text, even.
    num_pairs: Pairs of a text, each asked again and again.
    num_keys: Keys that there are.
    num_values: Values that there are.
    width: Width of the residual stream.
    rate: Highest learning rate.
  """

  num_seeds: int = 4
  first_seed: int = 0
  num_steps: int = 2400
  num_records: int = 48
  batch_size: int = 16
  seq_len: int = 48
  num_pairs: int = 4
  num_keys: int = 28
  num_values: int = 32
  width: int = 48
  rate: float = 3e-3

  def __post_init__(self):
    settings_lib.check_trained(self, "batch_size", "num_pairs")
    require.at_least("width", self.width, 2)
    for name in ("num_keys", "num_values"):
      require.between(name, getattr(self, name), self.num_pairs, 10**4)
    if self.seq_len % 2 or self.seq_len <= 2 * self.num_pairs:
      raise errors.UserError(
          "seq_len must be even and more than two tokens a pair of"
          f" num_pairs={self.num_pairs}, got {self.seq_len}."
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recall:
  """Pairs, then their keys again with their values: `texts.Task`.

  Attributes:
    seq_len: T.
    num_pairs: Pairs of a text.
    num_keys: Keys are tokens from 0, values those behind them.
    num_values: How many.
  """

  seq_len: int
  num_pairs: int
  num_keys: int
  num_values: int

  def draw(self, key: jax.Array, num_texts: int) -> texts.Texts:
    """Draws texts; keys after the first of each pair are asked."""
    keys = jax.random.split(key, 3)
    choose = lambda key, count: jax.vmap(
        lambda key: jax.random.permutation(key, count)[: self.num_pairs]
    )(jax.random.split(key, num_texts))
    key_of = choose(keys[0], self.num_keys)
    value_of = self.num_keys + choose(keys[1], self.num_values)
    num_more = self.seq_len // 2 - self.num_pairs
    more = jax.random.randint(keys[2], (num_texts, num_more), 0, self.num_pairs)
    first = jnp.broadcast_to(
        jnp.arange(self.num_pairs)[None], (num_texts, self.num_pairs)
    )
    which = jnp.concatenate([first, more], axis=1)
    both = [jnp.take_along_axis(x, which, axis=1) for x in (key_of, value_of)]
    tokens = jnp.stack(both, axis=-1).reshape(num_texts, self.seq_len)
    place = jnp.arange(self.seq_len)[None]
    is_asked = (place % 2 == 0) & (place >= 2 * self.num_pairs)
    is_asked = jnp.broadcast_to(is_asked, tokens.shape)
    return texts.Texts(tokens, jnp.roll(tokens, -1, axis=1), is_asked, is_asked)


def learner(config: ConvConfig, name: str) -> texts.Learner:
  """A model of `MODELS` and its task."""
  num_layers, attention = MODELS[name]
  model = configs.TransformerConfig(
      vocab_size=config.num_keys + config.num_values,
      num_layers=num_layers,
      embed_dim=config.width,
      num_heads=2,
      num_kv_heads=2,
      head_dim=config.width // 2 // 2 * 2,
      hidden_dim=2 * config.width,
      max_len=config.seq_len,
      attention=attention,
  )
  sizes = ("seq_len", "num_pairs", "num_keys", "num_values")
  task = Recall(**{name: getattr(config, name) for name in sizes})
  return texts.Learner(model=model, task=task, batch_size=config.batch_size)


def measure(
    config: ConvConfig, *, part: parts.Part | None = None
) -> dict[str, Any]:
  """Trains the three models.

  Args:
    config: Sizes.
    part: Keeps what is done.

  Returns:
    "rows", of each model: "accuracy" of the last record, an interval over
    seeds; "first" steps to the share that counts as learned, of each seed, and
    the seeds that "reached" it; "scores" along training, intervals; "steps",
    "guess", "claims" and "finding".
  """
  part = part or parts.at_once
  rows = {name: part(name, lambda n=name: _run(config, n)) for name in MODELS}
  told = _claims(config, rows)
  return {
      "num_seeds": config.num_seeds,
      "guess": 1 / config.num_pairs,
      "steps": rows["one plain layer"]["steps"],
      "rows": rows,
      "claims": told,
      "finding": claims.finding(told),
  }


def _run(config: ConvConfig, name: str) -> dict[str, Any]:
  trained = training.train(
      learner(config, name),
      settings_lib.seeds(config),
      schedule=training.Schedule(
          num_steps=config.num_steps,
          num_records=config.num_records,
          target_score=0.97,
      ),
      rate=config.rate,
  )
  first, reached = training.first_above(trained, _LEARNED)
  return {
      "accuracy": intervals.interval(trained.scores[:, -1], least=0, most=1),
      "first": first,
      "reached": reached,
      "steps": trained.steps,
      "scores": intervals.interval(trained.scores, least=0, most=1),
      "curves": trained.curves(),
  }


def _claims(
    config: ConvConfig, rows: dict[str, dict[str, Any]]
) -> list[claims.Row]:
  plain, convolved, two = (rows[name] for name in MODELS)
  steps = lambda row: (
      f"{row['reached']} of {config.num_seeds} seeds, after"
      f" {', '.join(map(str, row['first']))} steps"
  )
  guess = 1 / config.num_pairs
  later = (
      np.array(two["first"]) > np.array(convolved["first"])
      if convolved["reached"] == config.num_seeds
      else np.zeros(1)
  )
  return [
      claims.row(
          "one layer with convolved queries, keys and values recalls",
          "above .95 of the keys",
          intervals.text(convolved["accuracy"]),
          convolved["accuracy"]["mean"] > 0.95,
      ),
      claims.row(
          "one plain layer stays near a guess among the text's values",
          f"at most .15 above {guess:.2f}",
          intervals.text(plain["accuracy"]),
          plain["accuracy"]["mean"] <= guess + 0.15,
      ),
      claims.row(
          f"two plain layers reach {_LEARNED:g} later than one convolved, if"
          f" at all within {config.num_steps} steps",
          "later from every seed",
          f"convolved {steps(convolved)}; two plain {steps(two)}",
          bool(later.all()),
      ),
  ]


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws the share of right answers along training."""
  return drawing.draw_recall(summary, list(MODELS), 2.8)


STUDY = study_lib.Study(
    title="Convolved queries, keys and values: recall in one layer",
    config=ConvConfig(),
    smoke=dict(
        batch_size=2,
        seq_len=8,
        num_pairs=2,
        num_keys=4,
        num_values=4,
        width=8,
        num_seeds=2,
        num_steps=2,
        num_records=2,
    ),
    measure=study_lib.in_parts("conv", measure),
    draw=draw,
    caption=(
        "Share of asked keys that are answered by their value, along training;"
        " runs end above .97 and stay there in the figure. Dotted: a"
        f" guess among the values of the text. {study_lib.BANDS}"
    ),
    report_title="Attention systems",
)
