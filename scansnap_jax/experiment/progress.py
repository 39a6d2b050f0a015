"""How far a run is: a bar on a terminal, else a line now and then on stderr.

`watch` is entered once a process (`launch.command.app`), `bar` wherever
something takes long; what the innermost bar knows is what is told:

  with progress.bar("lm", total=500, unit="tokens", per_step=2048) as advance:
    for _ in range(500):
      advance(1)
      progress.show(loss=loss)

Without a terminal (nohup, SLURM, Docker) nobody waits longer than `EVERY` for a
word: `lm: 40 of 500, loss 2.31, 812 tokens/s, 0:19 left`, or what it waits for.
"""

from collections.abc import Callable, Iterator
import contextlib
import sys
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # What a terminal needs is imported where there is one.
  from rich import progress as rich_progress

# Seconds that may pass between two lines.
EVERY = 20.0
_MOMENT = 0.05  # Seconds.
# A program that takes less to compile is not worth a line.
_WORTH_A_LINE = 1.0
_COMPILE_EVENTS = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)


class _Work:
  """What is known of one piece of work; `lines` says it in words."""

  def __init__(self, name: str, total: int, unit: str, per_step: int | float):
    self.name, self.total = name, total
    self.unit, self.per_step = unit, per_step
    self.done = 0
    self.shown: dict[str, int | float] = {}
    self.started = time.monotonic()
    self.compile_seconds = 0.0
    self.is_compiled = False
    # When speed began to count, and how far it was then: what a resumed run had
    # done already, and what was compiled, does not belong to it.
    self._first: tuple[float, int] | None = None
    # When the last steps were counted, and how many they were.
    self._last = self.started, 0

  def advance(self, num_steps: int) -> None:
    """Counts steps."""
    now = time.monotonic()
    self.done += num_steps
    self._last = now, num_steps
    # What comes in one moment was there before, such as rows of a resumed run
    # that are told one by one.
    if num_steps and (self._first is None or now - self._first[0] < _MOMENT):
      self._first = now, self.done

  def count_compilation(self) -> None:
    """Notes that a program was compiled; speed counts from behind it."""
    self.is_compiled = True
    if self._first is not None and self._first[1] == self.done:
      self._first = None

  def rate(self) -> float | None:
    """Units a second; None before there are any."""
    if self._first is None or self.done == self._first[1]:
      return None
    (since, before), (last, more) = self._first, self._last
    steps = self.done - before
    # Between two counts the speed is the last known one, until as many steps as
    # before are overdue.
    seconds = [(last - since, steps), (time.monotonic() - since, steps + more)]
    rates = [n * self.per_step / passed for passed, n in seconds if passed]
    return min(rates, default=None)

  def state(self) -> str:
    """What it waits for, or shown values and speed."""
    if not self.done:
      return "working" if self.is_compiled else "compiling"
    parts = [f"{name} {value:.4g}" for name, value in self.shown.items()]
    rate = self.rate()
    if rate is not None:
      parts.append(f"{rate:,.3g} {self.unit}/s")
    return ", ".join(parts)

  def line(self) -> str:
    """How far it is, in one line."""
    seconds = time.monotonic() - self.started
    if not self.done:
      return f"{self.name}: {self.state()}, {seconds:.0f} s so far"
    parts = [f"{self.name}: {self.done:,} of {self.total:,}", self.state()]
    rate = self.rate()
    if rate is not None:
      passed, more = time.monotonic() - self._last[0], self._last[1]
      # At most as many steps as were counted last are nearly there by now.
      ahead = min(passed, more * self.per_step / rate)
      left = (self.total - self.done) * self.per_step / rate - ahead
      parts.append(f"{_clock(max(left, 0))} left")
    return ", ".join(filter(None, parts))

  def last_line(self) -> str:
    """That it has ended."""
    seconds = time.monotonic() - self.started
    state = self.state() if self.done else ""
    parts = [f"{self.name}: done in {seconds:.1f} s", state]
    return ", ".join(filter(None, parts))


class _Voice:
  """Who speaks for the process, and when it spoke last.

  Attributes:
    is_main: Whether this is the process of a run that speaks.
    work: The open bars, innermost last.
    bars: The terminal's display, if there is one.
    started: When it began to be watched.
    last: When it spoke last.
    ticker: What ends the thread that speaks now and then, and the thread.
  """

  def __init__(self):
    self.is_main = True
    self.work: list[_Work] = []
    self.bars: "rich_progress.Progress | None" = None
    self.started = self.last = time.monotonic()
    self.ticker: tuple[threading.Event, threading.Thread] | None = None
    self._listens = False

  def say(self, line: str) -> None:
    """Writes a line of progress to stderr; above the bar on a terminal."""
    self.last = time.monotonic()
    if not self.is_main:
      return
    if self.bars is not None:
      self.bars.console.print(line, markup=False, highlight=False)
      return
    # A closed stderr must not end a run.
    with contextlib.suppress(OSError, ValueError):
      print(line, file=sys.stderr, flush=True)

  def tick(self) -> None:
    """Says how things stand if nothing was said for `EVERY` seconds."""
    if time.monotonic() - self.last < EVERY:
      return
    if self.work:
      self.say(self.work[-1].line())
    else:
      self.say(f"working, {time.monotonic() - self.started:.0f} s so far")

  def listen(self) -> None:
    """Has jax tell what it compiles, once jax is there."""
    monitoring = sys.modules.get("jax.monitoring")
    if monitoring is not None and not self._listens:
      self._listens = True
      monitoring.register_event_duration_secs_listener(self._on_duration)

  def _on_duration(self, event: str, seconds: float, **_: str | int) -> None:
    if event not in _COMPILE_EVENTS or not self.work:
      return
    work = self.work[-1]
    work.compile_seconds += seconds
    if event != _COMPILE_EVENTS[-1] or seconds < _WORTH_A_LINE:
      return
    if not work.is_compiled and self.bars is None:
      self.say(f"{work.name}: compiled in {work.compile_seconds:.0f} s")
    work.count_compilation()


_voice = _Voice()


def begin() -> None:
  """From here on a line comes now and then, if stderr is no terminal.

  `watch` begins where nobody has; a script does before its imports, which take
  half a minute where others work too.
  """
  if _voice.ticker is not None:
    return
  _voice.started = _voice.last = time.monotonic()
  if sys.stderr is None or sys.stderr.isatty():
    return
  is_over = threading.Event()

  def keep_ticking() -> None:
    while not is_over.wait(EVERY / 20):
      _voice.tick()

  thread = threading.Thread(target=keep_ticking, daemon=True)
  thread.start()
  _voice.ticker = is_over, thread


@contextlib.contextmanager
def watch() -> Iterator[None]:
  """While it is open and stderr is no terminal, a line comes now and then."""
  begin()
  try:
    yield
  finally:
    if _voice.ticker is not None:
      is_over, thread = _voice.ticker
      is_over.set()
      thread.join()
      _voice.ticker = None


def set_main(is_main: bool) -> None:
  """Says whether this process of a run on several hosts is the one to speak."""
  _voice.is_main = is_main


def say(line: str) -> None:
  """Writes a line about the work to stderr: a setting or a file has ended."""
  _voice.say(line)


def heard() -> None:
  """Notes that the script wrote something by itself just now."""
  _voice.last = time.monotonic()


def show(**values: int | float) -> None:
  """Shows values, such as the loss, with the innermost bar from now on."""
  if _voice.work:
    _voice.work[-1].shown.update(values)


@contextlib.contextmanager
def bar(
    name: str, *, total: int, unit: str, per_step: int | float = 1
) -> Iterator[Callable[[int], None]]:
  """Shows how far a piece of work is, its speed and the time that is left.

  Args:
    name: What is being done.
    total: Its steps in all.
    unit: What its speed is counted in: tokens, runs, texts.
    per_step: How many of them a step is.

  Yields:
    A function to be told how many steps have been taken since.
  """
  work = _Work(name, total, unit, per_step)
  _voice.listen()
  _voice.work.append(work)
  try:
    if sys.stderr.isatty() and _voice.bars is None and _voice.is_main:
      with _on_terminal(work) as advance:
        yield advance
    else:
      yield work.advance
      if _voice.bars is None:
        _voice.say(work.last_line())
  finally:
    _voice.work.remove(work)


@contextlib.contextmanager
def _on_terminal(work: _Work) -> Iterator[Callable[[int], None]]:
  from rich import console
  from rich import progress

  with progress.Progress(
      progress.TextColumn("{task.description}", markup=False),
      progress.BarColumn(),
      progress.TaskProgressColumn(),
      progress.TextColumn("{task.fields[state]}", markup=False),
      progress.TimeRemainingColumn(),
      console=console.Console(stderr=True),
  ) as display:
    _voice.bars = display
    task = display.add_task(work.name, total=work.total, state=work.state())

    def advance(num_steps: int) -> None:
      work.advance(num_steps)
      display.update(task, advance=num_steps, state=work.state())

    try:
      yield advance
    finally:
      _voice.bars = None


def _clock(seconds: float) -> str:
  """0:19, 12:05, 1:02:03."""
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
