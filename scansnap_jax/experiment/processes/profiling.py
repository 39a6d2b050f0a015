"""A trace of some steps of a run, which XProf and TensorBoard show.

Steps run in programs of several, from one row of metrics to the next, so that
a trace begins and ends with one.
"""

import pathlib
import types

import jax

from scansnap_jax.experiment import errors

# First step, and one after the last.
Steps = tuple[int, int]


def parse(text: str) -> Steps:
  """Steps from text such as 100:150.

  Raises:
    UserError: It is none.
  """
  parts = text.split(":")
  if len(parts) == 2 and all(part.isdecimal() for part in parts):
    start, stop = map(int, parts)
    if start < stop:
      return start, stop
  raise errors.UserError(
      f"profile={text} must be the first step and one after the last, as"
      " 100:150."
  )


class Profiler:
  """Traces the programs that some steps are in."""

  def __init__(self, steps: Steps | None, folder: pathlib.Path):
    """Nothing is traced yet.

    Args:
      steps: Which; None is none.
      folder: Where traces go, a folder for each process where there are some.
    """
    if jax.process_count() > 1:
      folder = folder / f"process_{jax.process_index()}"
    self._steps, self._folder, self._is_on = steps, folder, False

  def begin(self, start: int, end: int) -> None:
    """To be called before steps from `start` to `end` are taken."""
    if self._steps is None or self._is_on:
      return
    first, stop = self._steps
    if start < stop and end > first:
      try:
        jax.profiler.start_trace(str(self._folder))
      except (OSError, RuntimeError) as error:
        raise errors.UserError(
            f"no trace can be written to {self._folder}: {error}"
        ) from error
      self._is_on = True

  def finish(self, end: int) -> None:
    """To be called when all steps before `end` have been taken."""
    if self._is_on and self._steps is not None and end >= self._steps[1]:
      self.close()

  def close(self) -> None:
    """Writes the trace, if one is being made."""
    if self._is_on:
      self._is_on = False
      jax.profiler.stop_trace()

  def __enter__(self) -> "Profiler":
    return self

  def __exit__(
      self,
      kind: type[BaseException] | None,
      error: BaseException | None,
      trace: types.TracebackType | None,
  ) -> None:
    self.close()
