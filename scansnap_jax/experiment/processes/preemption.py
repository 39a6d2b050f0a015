"""A stop that a signal asked for, taken between two steps.

Ctrl-C, SIGTERM, or SIGHUP, with which a terminal that closes ends its jobs. A
run saves at its next evaluation and stops. Who asked may not wait so long: a
cluster ends what is left after its grace period, without a word. A run that
knows the period says so first, and says early that its evaluations are too far
apart.
"""

from collections.abc import Callable, Iterator
import contextlib
import signal
import sys
import threading
import time
import types
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from scansnap_jax.experiment.processes import interrupts

_HELD = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Of the process, as signals are; what asked for the last stop.
_last_signal: int = signal.SIGTERM
_SAID = float("inf")
_grace: int | float = 0  # Seconds; 0 is as long as it takes.
# When the last evaluation ended, of the loop that holds the signals back.
_evaluated: float | None = None


def set_grace(seconds: int | float) -> None:
  """Says how long a run has to save after a signal; 0 is as long as it takes.

  For the process, as signals are. Loops that are under way keep theirs.
  """
  global _grace
  _grace = seconds


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
  """Holds the signals back; yields a function that tells of them.

  A second signal of the same kind acts as usual, and one that was ignored (by
  nohup) stays so. Outside the main thread signals cannot be held, and the
  function always answers False.

  Example:
    >>> with stop_requests() as stop_requested:
    ...   stop_requested()
    False
  """
  global _evaluated
  _evaluated = None
  requested = threading.Event()
  if threading.current_thread() is not threading.main_thread():
    yield requested.is_set
    return
  # The handlers before ours: a second Ctrl-C ends the run at once, and whoever
  # calls us gets theirs back.
  previous: dict[int, Any] = {}
  patience = threading.Timer(_grace, _end_unsaved, (_grace,))
  patience.daemon = True

  def note(signal_number: int, _: types.FrameType | None) -> None:
    global _last_signal
    _last_signal = signal_number
    if _grace and not requested.is_set():
      patience.start()
    requested.set()
    interrupts.take(signal_number)
    signal.signal(signal_number, previous[signal_number])

  for number in _HELD:
    if signal.getsignal(number) is not signal.SIG_IGN:
      previous[number] = signal.signal(number, note)
  try:
    yield requested.is_set
  finally:
    patience.cancel()
    for number, handler in previous.items():
      signal.signal(number, handler)


def on_any_process(requested: bool) -> bool:
  """True on every process if it is true on one: they stop at the same step.

  Asked at every evaluation, which is when a run can stop.
  """
  _tell_of_long_way()
  if jax.process_count() == 1:
    return requested
  return bool(multihost_utils.process_allgather(np.array(requested)).any())


def _tell_of_long_way() -> None:
  """Says once that a signal would come long before an evaluation."""
  global _evaluated
  if _evaluated == _SAID:
    return
  now = time.monotonic()
  seconds = 0.0 if _evaluated is None else now - _evaluated
  _evaluated = now
  if 0 < _grace < seconds:
    print(
        f"evaluations, at which a run saves and stops, are {seconds:.0f} s"
        f" apart, more than --grace={_grace:g}: a signal may cost what was done"
        " since the last checkpoint. Lower log_every.",
        file=sys.stderr,
    )
    _evaluated = _SAID


def _end_unsaved(grace: int | float) -> None:
  """Ends the process before somebody else does so without a word."""
  interrupts.end(
      f"stopped by {interrupts.name_of(_last_signal)}: no evaluation, at which"
      f" a run saves, came within --grace={grace:g} s. The same command"
      " continues from the last checkpoint.",
      128 + _last_signal,
  )


class Stopped(Exception):
  """A run stopped because it was asked to, with its state saved.

  Attributes:
    status: What the process should exit with, as a shell reports the signal
      that asked: 130 for Ctrl-C, 129 for SIGHUP, 143 for SIGTERM or where
      another process was asked.
  """

  def __init__(self, where: str):
    super().__init__(where)
    self.status = 128 + _last_signal
