"""Ctrl-C, SIGTERM, SIGHUP outside of training: one line, the shell's status.

The package installs this before a script's first import. A training loop holds
the signals back (`preemption.stop_requests`), saves and then stops; everywhere
else nothing is lost by leaving at once, as files are written whole or not at
all. Python runs a signal's handler between two of its own steps alone: a
compilation of half a minute, or a library that catches every exception, would
delay or swallow it. So a thread waits for the signal too.
"""

import atexit
import collections
from collections.abc import Callable
import contextlib
import os
import signal
import sys
import threading
import time
import types
from typing import NoReturn

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SHOW_CURSOR = "\x1b[?25h"  # A progress bar hides it.
_leaving = threading.Lock()
# How many signals of a kind the main thread took and the other has yet to see.
# Less than zero: the other saw them first.
_taken: collections.Counter[int] = collections.Counter()
# Called with the signal's number before the process ends by it.
_farewells: list[Callable[[int], object]] = []
# The process's standard error, whoever stands in for it at the time.
_standard_error: int | None = None


def install() -> None:
  """Lets signals end the process, but for those it was started to ignore."""
  global _standard_error
  if leave in map(signal.getsignal, _SIGNALS):
    return  # It has been installed.
  open_closed_streams()
  _standard_error = os.dup(2)
  for number in _SIGNALS:
    if signal.getsignal(number) is not signal.SIG_IGN:
      signal.signal(number, leave)
  atexit.register(_ignore)
  arrived, on_signal = os.pipe()
  os.set_blocking(on_signal, False)
  signal.set_wakeup_fd(on_signal, warn_on_full_buffer=False)
  threading.Thread(target=_watch, args=(arrived,), daemon=True).start()


def open_closed_streams() -> None:
  """Gives stdin, stdout and stderr that are closed (`2>&-`) a place: nowhere.

  Otherwise the next file to be opened would get a stream's number, and what a
  library or a child process writes there would end in that file.
  """
  for number in range(3):
    try:
      os.fstat(number)
    except OSError:
      os.open(os.devnull, os.O_RDWR)  # Gets the least number that is free.
      os.set_inheritable(number, True)


def _ignore() -> None:
  """Lets a process that is done leave, whoever asks it to.

  The interpreter gives handlers back as it ends; a signal would then make a
  failure of a run that has said and written all.
  """
  for number in _SIGNALS:
    signal.signal(number, signal.SIG_IGN)


def take(number: int) -> None:
  """Says that the main thread has taken a signal, which nobody may act on.

  Args:
    number: Of the signal. Its handler may be `leave` again by the time that
      the thread which waits for signals sees it.
  """
  _taken[number] += 1


def before_leaving(farewell: Callable[[int], object]) -> None:
  """Lets a function know of the signal that ends the process, before it does.

  Args:
    farewell: Takes the signal's number, in any thread, and does not wait.
  """
  _farewells.append(farewell)


def leave(number: int, frame: types.FrameType | None = None) -> NoReturn:
  """Ends the process as a shell expects of one that a signal ended.

  Args:
    number: Of the signal; the status is 128 more.
    frame: Where the main thread was.
  """
  del frame
  _begin_to_leave()
  for farewell in _farewells:
    with contextlib.suppress(Exception):  # Nothing may keep the process.
      farewell(number)
  _end(f"stopped by {name_of(number)}.", 128 + number)


def name_of(number: int) -> str:
  """Returns what a user calls a signal."""
  return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def end(line: str, status: int) -> NoReturn:
  """Ends the process at once, whatever its threads wait for.

  Args:
    line: What standard error is told, without its end.
    status: The exit status.
  """
  _begin_to_leave()
  _end(line, status)


def _begin_to_leave() -> None:
  """Waits for ever if another thread is about to end the process."""
  if not _leaving.acquire(blocking=False):
    while True:
      time.sleep(1)


def _end(line: str, status: int) -> NoReturn:
  try:
    if sys.stderr is not None:
      line = (_SHOW_CURSOR if sys.stderr.isatty() else "") + line
    # Buffers may be locked by who was interrupted.
    place = 2 if _standard_error is None else _standard_error
    os.write(place, f"{line}\n".encode())
  except (OSError, ValueError):
    pass  # It was closed.
  os._exit(status)


def _watch(arrived: int) -> None:
  """Acts on signals that nobody holds back, whatever the main thread does."""
  while arrival := os.read(arrived, 1):
    (number,) = arrival
    # A loop's handler gives its place back to `leave` at once: a signal that it
    # took must not end the process because this thread is late.
    if signal.getsignal(number) is leave and _taken[number] <= 0:
      leave(number)
    _taken[number] -= 1
