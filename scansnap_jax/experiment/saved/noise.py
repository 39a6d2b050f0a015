"""What orbax logs, and what of it is shown."""

from collections.abc import Generator
import contextlib
import functools
import logging
import sys
from typing import Any
import warnings


class OrbaxNoise(logging.Filter):
  """Drops what orbax logs at every step, and all of it where told so.

  A failed restore, or a full disk, logs hundreds of lines, and leaves reads
  behind that complain that their event loop is closed; it is raised too, and
  the caller reports it in one line.
  """

  def __init__(self):
    super().__init__()
    self._level = logging.WARNING
    self._loggers = [logging.getLogger(n) for n in ("absl", "asyncio")]
    self._next_hook = sys.unraisablehook

  def attach(self) -> None:
    """Begins to drop what orbax logs."""
    for logger in self._loggers:
      logger.addFilter(self)
    self._next_hook = sys.unraisablehook
    sys.unraisablehook = self._hook

  def detach(self) -> None:
    """Ends it."""
    for logger in self._loggers:
      logger.removeFilter(self)
    if sys.unraisablehook == self._hook:
      sys.unraisablehook = self._next_hook

  @contextlib.contextmanager
  def silenced(self) -> Generator[None, None, None]:
    """Drops errors, too."""
    self._level = logging.CRITICAL + 1
    try:
      with warnings.catch_warnings():
        # Coroutines that a failure left behind were never awaited.
        warnings.simplefilter("ignore", RuntimeWarning)
        yield
    finally:
      self._level = logging.WARNING

  def keep_dropping(self) -> None:
    """For good, after a failed write: what it left is told of at the exit."""
    ignore = functools.partial(
        warnings.filterwarnings, "ignore", category=RuntimeWarning
    )
    # Methods of orbax's handlers, and whatever the interpreter finds as it
    # leaves, where no frame of anybody's is left.
    ignore(r"coroutine '[\w.<>]*Handler\.\w+' was never awaited")
    ignore(r"coroutine '.*' was never awaited", module="sys$")

  def filter(self, record: logging.LogRecord) -> bool:
    """Whether a record is shown."""
    is_noise = record.name == "asyncio" or "orbax" in record.pathname
    is_raised = record.levelno >= logging.ERROR
    return not is_noise or (record.levelno >= self._level and not is_raised)

  def _hook(self, unraisable: Any) -> None:
    is_late = str(unraisable.exc_value) == "Event loop is closed"
    if self._level == logging.WARNING and not is_late:
      self._next_hook(unraisable)
