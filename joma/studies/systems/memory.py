"""Does a deep memory hold more pairs than a linear one of as many bytes?

A memory reads pairs of random unit keys and values once, one after the other,
and is then asked for all of them: the inner loop of Titans
(https://arxiv.org/abs/2501.00663) by itself, without a model round it. First
weights, steps, momentum and forgetting are learned. A linear memory of H x H
holds as many orthogonal keys as it has channels; the paper's is a network. It
is compared at equal bytes, H x h and h x H with h = H / 2, and with twice as
many, H x H twice.

The figure shows the share of values that are recalled against pairs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from etils import epy

from joma.studies import settings as settings_lib
from joma.studies import study as study_lib
from scansnap_jax.experiment import require

with epy.lazy_imports():  # --help imports this file, and waits for no jax.
  import jax
  import jax.numpy as jnp
  import jaxtyping
  from matplotlib import figure as mpl_figure
  import numpy as np

  from joma.studies import claims
  from joma.studies import drawing
  from joma.studies import parts
  from joma.studies import training
  from joma.systems.mixers.memory import titans_memory
  from scansnap_jax.experiment import figures
  from scansnap_jax.experiment import intervals

# Widths between key and value, as shares of the key's size.
MODELS: dict[str, tuple[float, ...]] = {
    "linear": (),
    "deep, equal bytes": (0.5,),
    "deep, twice the bytes": (1.0,),
}
_LINEAR, _EQUAL, _TWICE = MODELS


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryConfig:
  """Does a deep memory hold more pairs than a linear one of as many bytes?

  Attributes:
    num_seeds: Runs of each memory and number of pairs.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    num_steps: Steps of a run, a multiple of num_records.
    num_records: Records of each run.
    batch_size: Lists of pairs of a step, drawn anew.
    size: Channels of a key and of a value, even.
    pairs: Pairs of a list.
    chunk: Pairs whose gradients are of the same weights.
    rate: Highest learning rate.
  """

  num_seeds: int = 3
  first_seed: int = 0
  num_steps: int = 300
  num_records: int = 10
  batch_size: int = 16
  size: int = 16
  pairs: tuple[int, ...] = (8, 16, 32)
  chunk: int = 1
  rate: float = 0.01

  def __post_init__(self):
    settings_lib.check_runs(self)
    settings_lib.require_several("pairs", self.pairs)
    settings_lib.require_multiple("size", self.size, 2)
    for name in ("batch_size", "chunk"):
      require.at_least(name, getattr(self, name), 1)
    for count in self.pairs:
      require.between("pairs", count, 2, 10**4)
    require.positive("rate", self.rate)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lists:
  """A memory and lists of pairs: `training.Problem`.

  Attributes:
    config: Sizes.
    name: Of `MODELS`.
    count: Pairs of a list.
  """

  config: MemoryConfig
  name: str
  count: int

  def init(self, key: jax.Array) -> jaxtyping.PyTree:
    """Draws the first weights, and starts the three rates."""
    inner = [round(self.config.size * share) for share in MODELS[self.name]]
    sizes = [self.config.size, *inner, self.config.size]
    keys = jax.random.split(key, len(sizes))
    weights = [
        size**-0.5 * jax.random.normal(one, (1, size, after))
        for one, size, after in zip(keys, sizes, sizes[1:], strict=False)
    ]
    # Of sigmoids: steps of .25, no momentum or forgetting to speak of.
    return {"weights": weights, "rates": jnp.array([-4.0, 0.0, -4.0])}

  def loss(
      self, params: jaxtyping.PyTree, key: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Squared error of what is recalled; share that is nearest to its value."""
    c = self.config
    shape = (2, c.batch_size, self.count, 1, c.size)
    keys, values = jax.random.normal(key, shape)
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    keys, values = unit(keys), unit(values)
    keep, rate, forget = jax.nn.sigmoid(params["rates"])
    of_pairs = lambda x: jnp.broadcast_to(x, keys.shape[:-1])
    tokens = titans_memory.Tokens(
        keys,
        keys,
        values,
        of_pairs(keep),
        of_pairs(0.5 * rate),
        of_pairs(forget),
    )
    state = titans_memory.begin(tuple(params["weights"]), c.batch_size)
    lengths = jnp.full(c.batch_size, self.count)
    _, state = titans_memory.sweep(state, tokens, lengths, c.chunk)
    ask = jax.vmap(titans_memory.recall, in_axes=(None, 0))
    own = tuple(weights[:, 0] for weights in state.memory)
    found = jax.vmap(ask)(own, keys[:, :, 0])
    near = jnp.einsum("BPH,BQH->BPQ", found, values[:, :, 0])
    is_right = near.argmax(axis=-1) == jnp.arange(self.count)[None]
    error = jnp.square(found - values[:, :, 0]).sum(axis=-1)
    return error.mean(), is_right.mean()


def measure(
    config: MemoryConfig, *, part: parts.Part | None = None
) -> dict[str, Any]:
  """Learns how to learn, for every memory and number of pairs.

  Args:
    config: Sizes.
    part: Keeps what is done.

  Returns:
    "rows", of each memory by number of pairs: "recall" and "error" of the last
    record, intervals over seeds, and "recalls" of each seed; "pairs", "claims"
    and "finding".
  """
  part = part or parts.at_once
  rows = {
      name: [
          part(f"{name}, {n} pairs", lambda m=name, n=n: _run(config, m, n))
          for n in config.pairs
      ]
      for name in MODELS
  }
  told = _claims(config, rows)
  return {
      "num_seeds": config.num_seeds,
      "pairs": list(config.pairs),
      "rows": rows,
      "claims": told,
      "finding": claims.finding(told),
  }


def _run(config: MemoryConfig, name: str, count: int) -> dict[str, Any]:
  trained = training.train(
      Lists(config=config, name=name, count=count),
      settings_lib.seeds(config),
      schedule=training.Schedule(
          num_steps=config.num_steps, num_records=config.num_records
      ),
      rate=config.rate,
  )
  return {
      "recall": intervals.interval(trained.scores[:, -1], least=0, most=1),
      "recalls": trained.scores[:, -1],
      "error": intervals.interval(trained.losses[:, -1], least=0),
      "steps": trained.steps,
      "curves": trained.curves(),
  }


def _claims(
    config: MemoryConfig, rows: dict[str, list[dict[str, Any]]]
) -> list[claims.Row]:
  told = []
  for place, count in enumerate(config.pairs):
    if count <= config.size:
      continue
    for name in (_EQUAL, _TWICE):
      one, two = (np.array(rows[x][place]["recalls"]) for x in (_LINEAR, name))
      apart = intervals.interval(two - one)
      told.append(
          claims.row(
              f"{name}: it recalls more of {count} pairs, more than a key has"
              " channels, than a linear memory",
              "a gap whose interval over seeds is above 0",
              f"{intervals.text(apart, 3)}: linear"
              f" {intervals.text(rows[_LINEAR][place]['recall'], 3)}, deep"
              f" {intervals.text(rows[name][place]['recall'], 3)}",
              apart["low"] > 0,
          )
      )
  return told


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws the share of values that are recalled against pairs."""
  looks = drawing.looks_of([*MODELS])
  x = np.array(summary["pairs"], float)
  with figures.style():
    figure = figures.make_figure(figures.COLUMN_WIDTH, 2.6)
    axes = figure.subplots()
    for name, row in summary["rows"].items():
      points = drawing.points([each["recall"] for each in row])
      drawing.draw_points(axes, x, points, looks[name], name)
    axes.set(xlabel="pairs", ylabel="share recalled", ylim=(0, 1.03))
    axes.set_xscale("log", base=2)
    axes.set_xticks(x, [f"{count:g}" for count in x])
    figures.put_legend_above(figure, figures.legend_entries(axes))
  return figure


STUDY = study_lib.Study(
    title="What a memory that learns as it reads can hold",
    config=MemoryConfig(),
    smoke=dict(
        batch_size=2,
        size=4,
        pairs=(2, 6),
        num_seeds=2,
        num_steps=2,
        num_records=2,
    ),
    measure=study_lib.in_parts("memory", measure),
    draw=draw,
    caption=(
        "Share of values that are nearest to what a memory recalls at their"
        " keys, after pairs were read once; means over seeds and 95 % intervals"
        " (Student's t)."
    ),
    report_title="Attention systems",
)
