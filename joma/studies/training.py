"""Trains small models from several seeds, in one program, for a study.

Adam with decoupled decay, clipped at norm 1, a warm-up and a half cosine. Each
step draws new examples; a run may end where its loss falls below a target, so
that models can be compared at equal loss.

Letters: R runs (seeds), S records, N steps of one record.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree
import numpy as np
import optax

from scansnap_jax import ensemble
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import intervals

_WARMUP = 0.05


@runtime_checkable
class Problem(Protocol):
  """What is learned, and by what; a frozen dataclass, for it is static."""

  def init(self, key: Array) -> PyTree:
    """Draws the parameters."""
    ...

  def loss(self, params: PyTree, key: Array) -> tuple[Array, Array]:
    """Draws examples; returns their mean loss, and scores to be followed."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
  """How long runs train.

  Attributes:
    num_steps: Most steps of a run.
    num_records: S; divides `num_steps`.
    target_loss: A run ends at the first record whose mean loss is below it.
    target_score: Likewise, whose mean scores are all above it.
  """

  num_steps: int
  num_records: int
  target_loss: float = -np.inf
  target_score: float = np.inf


class Member(NamedTuple):
  """A run's own numbers.

  Attributes:
    seed: Of parameters and examples.
    rate: Highest learning rate.
    decay: Factor of the parameters that each step takes off, times the rate.
  """

  seed: np.int32
  rate: np.float32
  decay: np.float32


class Trained(NamedTuple):
  """Runs that were trained.

  Attributes:
    params: Leaves [R, ...].
    steps: Ends of the records [S].
    losses: Mean over the steps of each record [R, S]; after the end of a run
      its last.
    scores: Likewise, of each run [R, S, ...] in the shape of a step's.
    num_steps: Steps that each run took [R].
  """

  params: PyTree
  steps: Int[np.ndarray, "S"]
  losses: Float[np.ndarray, "R S"]
  scores: Float[np.ndarray, "R S *score"]
  num_steps: Int[np.ndarray, "R"]

  def params_of(self, run: int) -> PyTree:
    """The parameters of one run."""
    return jax.tree.map(lambda leaf: leaf[run], self.params)

  def curves(self) -> dict[str, list[float]]:
    """Means over runs, for metrics.jsonl."""
    return {
        "loss": self.losses.mean(axis=0).tolist(),
        "score": self.scores.mean(axis=0).tolist(),
    }


def train(
    problem: Problem,
    seeds: Sequence[int],
    *,
    schedule: Schedule,
    rate: float,
    decay: float = 0.0,
    start: Sequence[PyTree] | None = None,
) -> Trained:
  """Trains a model from each seed.

  Args:
    problem: What is learned.
    seeds: R of them.
    schedule: How long.
    rate: Highest learning rate.
    decay: See `Member`.
    start: Parameters that each run begins with; None draws them.

  Raises:
    UserError: A run diverged.
  """
  members = [
      Member(np.int32(seed), np.float32(rate), np.float32(decay))
      for seed in seeds
  ]
  layout = ensemble.make_ensemble(len(members))
  if start is None:
    # Outside of the program, as drawing many arrays takes long to compile.
    start = [problem.init(jax.random.key(seed)) for seed in seeds]
  run = layout.map(_train, problem=problem, schedule=schedule)
  laid_out = layout.scatter(
      jax.tree.map(lambda *x: np.stack(x), *zip(members, start, strict=True))
  )
  params, records = layout.gather(run(laid_out, ()))
  losses, scores, num_steps = records
  every = schedule.num_steps // schedule.num_records
  # A bounded read-out hides weights that are far off: their squares do not.
  with np.errstate(over="ignore"):
    is_good = layout.is_finite(jax.tree.map(np.square, params))
  is_good &= np.isfinite(losses).all(axis=1)
  if not is_good.all():
    raise errors.UserError(
        f"training diverged from seed {seeds[int(np.argmin(is_good))]}: use a"
        f" rate below {rate:g}, in a new workdir."
    )
  steps = every * (1 + np.arange(schedule.num_records))
  return Trained(params, steps, losses, scores, num_steps[:, -1])


def first_above(
    trained: Trained, score: float
) -> tuple[Int[np.ndarray, "R"], int]:
  """Steps that each run needs to a mean score above a bound.

  Returns:
    The steps; of runs that never get there, all steps; and how many got there.
  """
  is_above = trained.scores > score
  first = is_above.argmax(axis=1)
  has = is_above.any(axis=1)
  return np.where(has, trained.steps[first], trained.steps[-1]), int(has.sum())


def interval_text(values: Float[np.ndarray, "R"], digits: int = 3) -> str:
  """Mean over runs with its 95 % interval; one run alone has none."""
  if len(values) < 2:
    return f"{values[0]:.{digits}f}"
  return intervals.text(intervals.interval(values), digits)


# Loss, score and steps so far, at the end of a record.
_Record = tuple[Array, Array, Array]


def _train(
    run: tuple[Member, PyTree],
    _: tuple[()],
    *,
    problem: Problem,
    schedule: Schedule,
) -> tuple[PyTree, _Record]:
  """One run from its parameters; records have leaves [S]."""
  member, params = run
  draw = jax.random.fold_in(jax.random.key(member.seed), 1)
  every = schedule.num_steps // schedule.num_records
  rule = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())
  grad = jax.value_and_grad(problem.loss, has_aux=True)

  def step(
      state: tuple[PyTree, PyTree], number: Array
  ) -> tuple[tuple[PyTree, PyTree], tuple[Array, Array]]:
    params, moments = state
    found, grads = grad(params, jax.random.fold_in(draw, number))
    direction, moments = rule.update(grads, moments)
    rate = member.rate * _share(number, schedule.num_steps)
    move = lambda value, change: value - rate * (change + member.decay * value)
    return (jax.tree.map(move, params, direction), moments), found

  def record(
      carry: tuple[PyTree, _Record], first: Array
  ) -> tuple[tuple[PyTree, _Record], _Record]:
    def go(carry: tuple[PyTree, _Record]) -> tuple[PyTree, _Record]:
      numbers = first + jnp.arange(every)
      state, found = jax.lax.scan(step, carry[0], numbers)
      loss, score = (x.mean(axis=0).astype(jnp.float32) for x in found)
      return state, (loss, score, first + every)

    loss, score, _ = carry[1]
    is_done = (loss < schedule.target_loss) | (
        score > schedule.target_score
    ).all()
    carry = jax.lax.cond(is_done, lambda carry: carry, go, carry)
    return carry, carry[1]

  shape = jax.eval_shape(problem.loss, params, draw)[1].shape
  before = (jnp.float32(jnp.inf), jnp.full(shape, -jnp.inf), jnp.int32(0))
  firsts = every * jnp.arange(schedule.num_records)
  carry: Any = ((params, rule.init(params)), before)
  ended, records = jax.lax.scan(record, carry, firsts)
  return ended[0][0], records


def _share(number: Int[Array, ""], num_steps: int) -> Float[Array, ""]:
  """Of the highest rate: up in a line, then down in a half cosine."""
  warmup = max(1.0, _WARMUP * num_steps)
  step = number.astype(jnp.float32)
  done = jnp.clip((step - warmup) / max(1.0, num_steps - warmup), 0, 1)
  return jnp.minimum((step + 1) / warmup, (1 + jnp.cos(jnp.pi * done)) / 2)
