"""What a run does about losses that are no numbers, or far above those before.

  stop       it ends, with the last good checkpoint named
  skip       the update of such a step is left out, and its batch with it
  roll_back  the state goes back to the last checkpoint, and the run on to the
             batches behind the row that saw it, as PaLM's did
             (https://arxiv.org/abs/2204.02311, section 5.1)

All follow from what checkpoints hold, so that a run that is cut and continued
decides as one that is not.

Letters: N steps of an interval.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Bool, Float, PyTree
import numpy as np

from joma.transformer.training import layouts
from joma.transformer.training import lm_config
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import loop

# Rows in a row without one good step between.
_MOST_ROLL_BACKS = 3


class Mended(NamedTuple):
  """What became of an interval.

  Attributes:
    state: To go on with.
    num_skipped: Steps whose update is not in it.
    is_rolled_back: Whether it is an earlier one.
  """

  state: PyTree
  num_skipped: int
  is_rolled_back: bool = False


class Guard:
  """Looks at the losses of each interval and mends what it may."""

  def __init__(
      self,
      config: lm_config.LmConfig,
      layout: layouts.Layout,
      recorder: loop.Recorder,
      restore: Callable[[], PyTree],
  ):
    """Nothing has gone wrong yet.

    Args:
      config: Of the run.
      layout: How the state lies.
      recorder: Its checkpoints.
      restore: Returns the state of the last checkpoint, laid out; the first
        one where there is none.
    """
    self._config, self._layout = config, layout
    self._recorder, self._restore = recorder, restore
    self._num_in_a_row = 0

  def limit(
      self, losses: Float[np.ndarray, "num_steps"], start: int
  ) -> np.float32:
    """More than this is a spike, for the interval that begins at `start`."""
    before = losses[max(start - self._config.log_every, 0) : start]
    before = before[np.isfinite(before)]
    if self._config.spike is None or not before.size:
      return np.float32(np.inf)
    return np.float32(self._config.spike * before.mean())

  def mend(
      self,
      interval: loop.Interval,
      state: PyTree,
      losses: Float[np.ndarray, "N"],
      limit: np.float32,
  ) -> Mended:
    """Returns the state to go on with.

    Raises:
      UserError: The run is not to go on, or cannot.
    """
    is_good = np.isfinite(losses) & ~(losses > limit)
    if self._config.on_nan == "stop":
      self._check(interval, losses, is_good)
      return Mended(state, 0)
    if self._config.on_nan == "skip":
      if not is_good.any():
        raise errors.UserError(
            f"on_nan=skip left out all {len(losses)} steps from"
            f" {interval.start} to {interval.end}: {self._advice()}"
        )
      return Mended(state, int((~is_good).sum()))
    if is_good.all() and layouts.is_finite(state.params).all():
      self._num_in_a_row = 0
      return Mended(state, 0)
    return self._rolled_back(interval)

  def _rolled_back(self, interval: loop.Interval) -> Mended:
    self._num_in_a_row += 1
    if self._num_in_a_row > _MOST_ROLL_BACKS:
      raise errors.UserError(
          f"on_nan=roll_back went back {_MOST_ROLL_BACKS} times in a row, up to"
          f" step {interval.end}: {self._advice()}"
      )
    # The schedule goes on, as the data does.
    state = self._restore()
    state = state._replace(step=0 * state.step + interval.end)
    return Mended(state, len(interval.steps), True)

  def _check(
      self,
      interval: loop.Interval,
      losses: Float[np.ndarray, "N"],
      is_good: Bool[np.ndarray, "N"],
  ) -> None:
    """Refuses a spike; what is no number is the recorder's to refuse."""
    is_spike = ~is_good & np.isfinite(losses)
    if not is_spike.any():
      return
    step = int(np.argmax(is_spike))
    raise errors.UserError(
        f"the loss rose to {losses[step]:.6g} at step {interval.start + step},"
        f" above spike={self._config.spike:g} times the mean of the steps"
        f" before: {self._advice()} The last checkpoint is kept."
    )

  def _advice(self) -> str:
    return (
        "use a smaller lr in a new workdir, or give this one on_nan=skip or"
        " roll_back."
    )


def mean_of(losses: Float[np.ndarray, "N"]) -> Any:
  """The mean of those that are numbers; NaN where none is."""
  finite = losses[np.isfinite(losses)]
  return finite.mean() if finite.size else np.float32(np.nan)
