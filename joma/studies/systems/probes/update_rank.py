"""In which order does a deep linear network learn directions?

A product of matrices that starts small descends to a target matrix. Two or more
factors learn the target's singular directions one after the other, the largest
singular value first, so that what training has changed has a rank that grows
(https://arxiv.org/abs/2306.11250, https://arxiv.org/abs/1312.6120). One matrix
alone, the twin, learns them all at one pace. A direction has appeared when the
product holds half of its singular value; ranks are those of
`systems.probes.update_rank`.

Letters: R runs (seeds), N steps, S directions, D width.
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
  import jaxtyping
  from matplotlib import figure as mpl_figure
  import numpy as np

  from joma.studies import claims
  from joma.studies import drawing
  from joma.studies import parts
  from joma.systems.probes import update_rank
  from scansnap_jax.experiment import figures
  from scansnap_jax.experiment import intervals

_SPEARMAN = 0.95


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateRankConfig:
  """In which order does a deep linear network learn directions?

  Attributes:
    num_seeds: Runs of each depth.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    depths: Factors of the product; 1 is the twin.
    width: Rows and columns of every factor.
    num_directions: Singular values of the target that are not 0.
    largest: The first singular value; the last is 1, and steps are equal.
    initial: Standard deviation of a factor's numbers, times sqrt(width).
    rate: Step of gradient descent on half the squared distance.
    num_steps: Steps of a run, a multiple of num_records.
    num_records: Records of each run.
  """

  num_seeds: int = 5
  first_seed: int = 0
  depths: tuple[int, ...] = (1, 2, 3)
  width: int = 24
  num_directions: int = 10
  largest: float = 4.0
  initial: float = 0.01
  rate: float = 0.01
  num_steps: int = 20_000
  num_records: int = 2000

  def __post_init__(self):
    settings_lib.check_runs(self)
    if min(self.depths, default=0) < 1 or max(self.depths, default=0) < 2:
      raise errors.UserError(
          f"depths must be 1 or more, one of them 2 or more, got {self.depths}."
      )
    require.between("num_directions", self.num_directions, 3, self.width)
    for name in ("initial", "rate"):
      require.positive(name, getattr(self, name))
    if self.largest <= 1:
      raise errors.UserError(f"largest must be above 1, got {self.largest}.")


def measure(
    config: UpdateRankConfig, *, part: parts.Part | None = None
) -> dict[str, Any]:
  """Descends from every seed, at every depth.

  Args:
    config: Sizes.
    part: Keeps what is done.

  Returns:
    "values", the target's singular values; "rows" of each depth: "times" at
    which directions appear [R, S], "spearman" [R] of them and the order of the
    values, "held", shares of the singular values that the product has along
    training, and "ranks" of the update, mean over factors, of the first seed,
    and "first_rank", the rank of each factor's update when the first direction
    has appeared; "claims" and "finding".
  """
  part = part or parts.at_once
  rows = {
      str(depth): part(f"depth {depth}", lambda d=depth: _run(config, d))
      for depth in config.depths
  }
  told = _claims(config, rows)
  return {
      "values": _values(config),
      "steps": next(iter(rows.values()))["steps"],
      "rows": rows,
      "claims": told,
      "finding": claims.finding(told),
  }


def _values(config: UpdateRankConfig) -> jaxtyping.Float[np.ndarray, "S"]:
  return np.linspace(config.largest, 1, config.num_directions)


def draw_start(
    config: UpdateRankConfig, depth: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Draws the factors [depth, D, D], and directions [S, D] of both sides."""
  draw = np.random.default_rng((seed, depth))
  size, count = config.width, config.num_directions
  scale = config.initial / np.sqrt(size)
  factors = scale * draw.normal(size=(depth, size, size))
  side = lambda: np.linalg.qr(draw.normal(size=(size, size)))[0][:, :count].T
  return factors, side(), side()


def descend(
    config: UpdateRankConfig, factors: np.ndarray, target: np.ndarray
) -> np.ndarray:
  """Factors at the records of gradient descent [records, depth, D, D]."""

  def loss(factors: jax.Array) -> jax.Array:
    product = factors[0]
    for factor in factors[1:]:
      product = factor @ product
    return jnp.square(product - target).sum() / 2

  step = lambda x, _: (x - config.rate * jax.grad(loss)(x), None)
  every = config.num_steps // config.num_records

  def record(x: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
    x, _ = jax.lax.scan(step, x, None, length=every)
    return x, x

  run = jax.jit(
      lambda x: jax.lax.scan(record, x, None, length=config.num_records)[1]
  )
  return np.asarray(run(jnp.asarray(factors, jnp.float32)))


def _run(config: UpdateRankConfig, depth: int) -> dict[str, Any]:
  every = config.num_steps // config.num_records
  steps = every * (1 + np.arange(config.num_records))
  values, found = _values(config), []
  for seed in settings_lib.seeds(config):
    start, left, right = draw_start(config, depth, seed)
    target = np.einsum("Si,S,Sj->ij", left, values, right)
    path = descend(config, start, target)
    found.append(_read(config, path, start, left, right))
  curve = lambda name: found[0][name]
  return {
      "steps": steps,
      "times": np.array([row["times"] for row in found]),
      "spearman": [row["spearman"] for row in found],
      "first_rank": [row["first_rank"] for row in found],
      "held": curve("held"),
      "ranks": curve("ranks"),
      "curves": {"rank": curve("ranks").tolist()},
  }


def _read(
    config: UpdateRankConfig,
    path: np.ndarray,
    start: np.ndarray,
    left: np.ndarray,
    right: np.ndarray,
) -> dict[str, Any]:
  """One run: when directions appear, and ranks of the update."""
  product = path[:, 0]
  for i in range(1, path.shape[1]):
    product = path[:, i] @ product
  held = np.einsum("Si,Nij,Sj->NS", left, product, right) / _values(config)
  claims.require_finite("update_rank", held)
  times = np.array([appears(curve) for curve in held.T])
  ranks = lambda record: [
      update_rank.update_rank(now, before)
      for now, before in zip(path[record], start, strict=True)
  ]
  every = range(len(path))
  return {
      "held": held,
      "times": times,
      "spearman": spearman(times, np.arange(len(times))),
      "ranks": np.array([np.mean(ranks(record)) for record in every]),
      "first_rank": ranks(int(np.ceil(times.min()))),
  }


def appears(curve: jaxtyping.Float[np.ndarray, "N"]) -> float:
  """The record, with its fraction, at which a curve first is above a half.

  Raises:
    UserError: It never is.
  """
  above = np.flatnonzero(curve > 0.5)
  if not above.size:
    raise errors.UserError(
        "a direction did not appear: use more steps, in a new workdir."
    )
  last = int(above[0])
  if last == 0:
    return 0.0
  before, after = curve[last - 1 : last + 1]
  return last - 1 + float((0.5 - before) / (after - before))


def spearman(
    one: jaxtyping.Float[np.ndarray, "S"],
    two: jaxtyping.Shaped[np.ndarray, "S"],
) -> float:
  """Correlation of ranks, of values of which none are equal."""
  rank = lambda x: np.argsort(np.argsort(x)).astype(float)
  return float(np.corrcoef(rank(one), rank(two))[0, 1])


def _claims(
    config: UpdateRankConfig, rows: dict[str, dict[str, Any]]
) -> list[claims.Row]:
  told = []
  for depth in config.depths:
    row = rows[str(depth)]
    found = np.array(row["spearman"])
    text = intervals.text(intervals.interval(found, least=-1, most=1))
    if depth == 1:
      told.append(
          claims.row(
              "one matrix learns directions in no order of their values",
              "Spearman below .5 in size, mean over seeds",
              text,
              abs(found.mean()) < 0.5,
          )
      )
      continue
    first = np.array(row["first_rank"])
    told += [
        claims.row(
            f"{depth} factors learn directions in the order of their values",
            f"Spearman above {_SPEARMAN}, mean over seeds",
            text,
            found.mean() > _SPEARMAN,
        ),
        claims.row(
            f"the update of each of {depth} factors has rank 1 when the first"
            " direction has appeared",
            "every factor, every seed",
            f"rank {first.min():.0f} to {first.max():.0f}",
            bool((first == 1).all()),
        ),
    ]
  return told


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws what is held of each direction, and the rank of the update."""
  rows, steps = summary["rows"], np.asarray(summary["steps"])
  deepest = max(rows, key=int)
  looks = drawing.looks_of([*rows])
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 2.4)
    left, right = figure.subplots(1, 2)
    held = np.asarray(rows[deepest]["held"])
    shades = np.linspace(0, 0.75, held.shape[1])
    for curve, shade in zip(held.T, shades, strict=True):
      left.plot(steps, curve, color=str(shade), linewidth=0.9)
    left.set(xlabel="step", ylabel="share held", title=f"{deepest} factors")
    for name, row in rows.items():
      label = f"{name} factors" if name != "1" else "1 matrix"
      drawing.draw_curve(
          right, steps, np.asarray(row["ranks"]), looks[name], label
      )
    right.set(xlabel="step", ylabel="rank of the update", xscale="log")
    right.locator_params(axis="y", integer=True)
    figures.put_legend_above(figure, figures.legend_entries(right))
  return figure


STUDY = study_lib.Study(
    title="Rank of the update: directions in the order of their values",
    config=UpdateRankConfig(),
    smoke=dict(
        num_seeds=2,
        depths=(1, 2),
        width=4,
        num_directions=3,
        rate=0.1,
        num_steps=400,
        num_records=40,
    ),
    measure=study_lib.in_parts("update_rank", measure),
    draw=draw,
    caption=(
        "Of the first seed. Left: how much of each singular value of the target"
        " the product holds, the largest in black. Right: singular values that"
        " hold 90 % of what has changed, mean over factors."
    ),
    report_title="Attention systems",
)
