"""A stop that a signal asked for, taken between two steps.

Ctrl-C, SIGTERM, or SIGHUP, with which a terminal that closes ends its jobs.
"""

from collections.abc import Callable, Iterator
import contextlib
import signal
import threading
import types
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from scansnap_jax.experiment.processes import interrupts

_HELD = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Of the process, as signals are; what asked for the last stop.
_last_signal: int = signal.SIGTERM


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
  requested = threading.Event()
  if threading.current_thread() is not threading.main_thread():
    yield requested.is_set
    return
  # The handlers before ours: a second Ctrl-C ends the run at once, and whoever
  # calls us gets theirs back.
  previous: dict[int, Any] = {}

  def note(signal_number: int, _: types.FrameType | None) -> None:
    global _last_signal
    _last_signal = signal_number
    requested.set()
    interrupts.take(signal_number)
    signal.signal(signal_number, previous[signal_number])

  for number in _HELD:
    if signal.getsignal(number) is not signal.SIG_IGN:
      previous[number] = signal.signal(number, note)
  try:
    yield requested.is_set
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)


def on_any_process(requested: bool) -> bool:
  """True on every process if it is true on one: they stop at the same step."""
  if jax.process_count() == 1:
    return requested
  return bool(multihost_utils.process_allgather(np.array(requested)).any())


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
