"""Ctrl-C and SIGTERM outside of training: one line, and the shell's status.

The package installs this before a script's first import. A training loop holds
both signals back (`preemption.stop_requests`), saves and then stops; everywhere
else nothing is lost by leaving at once, as files are written whole or not at
all. Python runs a signal's handler between two of its own steps alone: a
compilation of half a minute, or a library that catches every exception, would
delay or swallow it. So a thread waits for the signal too.
"""

import contextlib
import os
import signal
import sys
import threading
import time
import types
from typing import NoReturn

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SHOW_CURSOR = "\x1b[?25h"  # A progress bar hides it.
_leaving = threading.Lock()
# The process's standard error, whoever stands in for it at the time.
_standard_error: int | None = None


def install() -> None:
  """Lets both signals end the process, unless it was started to ignore them."""
  global _standard_error
  if leave in map(signal.getsignal, _SIGNALS):
    return  # It has been installed.
  with contextlib.suppress(OSError):  # It was closed.
    _standard_error = os.dup(2)
  for number in _SIGNALS:
    if signal.getsignal(number) is not signal.SIG_IGN:
      signal.signal(number, leave)
  arrived, on_signal = os.pipe()
  os.set_blocking(on_signal, False)
  signal.set_wakeup_fd(on_signal, warn_on_full_buffer=False)
  threading.Thread(target=_watch, args=(arrived,), daemon=True).start()


def leave(number: int, frame: types.FrameType | None = None) -> NoReturn:
  """Ends the process as a shell expects of one that a signal ended.

  Args:
    number: Of the signal; the status is 128 more.
    frame: Where the main thread was.
  """
  del frame
  if not _leaving.acquire(blocking=False):
    while True:  # The other thread is about to end the process.
      time.sleep(1)
  name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
  text = f"stopped by {name}.\n"
  try:
    if sys.stderr is not None:
      text = (_SHOW_CURSOR if sys.stderr.isatty() else "") + text
    # Buffers may be locked by who was interrupted.
    os.write(2 if _standard_error is None else _standard_error, text.encode())
  except (OSError, ValueError):
    pass  # It was closed.
  os._exit(128 + number)


def _watch(arrived: int) -> None:
  """Acts on signals that nobody holds back, whatever the main thread does."""
  while number := os.read(arrived, 1):
    if signal.getsignal(number[0]) is leave:
      leave(number[0])
