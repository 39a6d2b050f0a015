import contextlib
import functools
import io
import os
import pathlib
import pty
import re
import subprocess
import sys
import time
from unittest import mock

from absl.testing import absltest

from scansnap_jax.experiment import progress

_ROOT = pathlib.Path(__file__).parents[3]

# A hundred runs of 50 steps: five at up to 10 runs/s, then the rest at once.
_PACE = 0.1
_SHOW = f"""
import time
from scansnap_jax.experiment import progress
name = "figure9 [/] [red]x :smile: {{}}"  # A name of the user's, as it is.
with progress.bar(name, total=5000, unit="runs", per_step=1 / 50) as advance:
  for _ in range(5):
    time.sleep({_PACE})
    progress.show(loss=2.5)
    advance(50)
  time.sleep({_PACE})
  progress.say("a line above")
  advance(50 * 95)
"""
_FRAME = re.compile(
    r"figure9 \[/\] \[red\]x :smile: \{\} +\S+ +(\d+)% +"
    r"(compiling|loss 2\.5(?:, ([\d.e+,]+) runs/s)?) +(\d+:\d\d:\d\d|-:--:--)"
)


@functools.cache
def _on_a_terminal():
  """Returns what a process writes to a terminal that is its stderr alone."""
  terminal, its_end = pty.openpty()
  process = subprocess.Popen(
      [sys.executable, "-c", _SHOW],
      stdout=subprocess.PIPE,
      stderr=its_end,
      cwd=_ROOT,
      env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
  )
  os.close(its_end)
  written = b""
  with contextlib.suppress(OSError):  # The end, on Linux.
    while chunk := os.read(terminal, 4096):
      written += chunk
  os.close(terminal)
  printed, _ = process.communicate()
  return process.returncode, printed, written.decode()


def _frames(written):
  """Yields percentage, state, runs/s and seconds left of every redraw."""
  plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", written)
  for percent, state, rate, left in _FRAME.findall(plain):
    seconds = None
    if left[0] != "-":
      hours, minutes, rest = map(int, left.split(":"))
      seconds = 3600 * hours + 60 * minutes + rest
    yield int(percent), state, float(rate) if rate else None, seconds


class TerminalTest(absltest.TestCase):

  def test_goes_to_stderr_and_leaves_stdout_to_the_program(self):
    code, printed, written = _on_a_terminal()
    self.assertEqual((code, printed), (0, b""), written)
    self.assertIn("figure9", written)
    self.assertIn("a line above", written)

  def test_starts_by_compiling_and_reaches_a_hundred_percent(self):
    frames = [*_frames(_on_a_terminal()[2])]
    self.assertEqual(frames[0], (0, "compiling", None, None))
    percent, state, _, left = frames[-1]
    self.assertEqual((percent, left), (100, 0))
    self.assertStartsWith(state, "loss 2.5")

  def test_rate_is_in_runs_and_fits_the_pace(self):
    rates = [
        rate
        for percent, _, rate, _ in _frames(_on_a_terminal()[2])
        if rate is not None and percent < 100
    ]
    self.assertNotEmpty(rates)
    for rate in rates:
      # Not faster than the pace; a busy machine may be much slower.
      self.assertBetween(rate, 0.1, 1 / _PACE)

  def test_gives_the_cursor_back(self):
    _, _, written = _on_a_terminal()
    self.assertIn("\x1b[?25l", written)
    self.assertGreater(written.rfind("\x1b[?25h"), written.rfind("\x1b[?25l"))


class _Clock:
  """Time that passes when it is told to."""

  def __init__(self):
    self.now = 1000.0

  def monotonic(self):
    return self.now


class LinesTest(absltest.TestCase):
  """Without a terminal."""

  def setUp(self):
    super().setUp()
    self.clock = _Clock()
    self.enter_context(mock.patch.object(progress, "time", self.clock))
    self.voice = progress._Voice()
    self.enter_context(mock.patch.object(progress, "_voice", self.voice))
    self.err, self.out = io.StringIO(), io.StringIO()
    self.enter_context(contextlib.redirect_stderr(self.err))
    self.enter_context(contextlib.redirect_stdout(self.out))

  def _pass(self, seconds):
    """Lets time pass as the watching thread sees it; returns what was said."""
    before = len(self.err.getvalue())
    for _ in range(round(seconds)):
      self.clock.now += 1
      self.voice.tick()
    return self.err.getvalue()[before:].splitlines()

  def _compile(self, seconds):
    self.voice._on_duration("/jax/core/compile/jaxpr_trace_duration", 2.0)
    name = "/jax/core/compile/backend_compile_duration"
    self.voice._on_duration(name, seconds)

  def test_nobody_waits_longer_than_the_time_between_two_lines(self):
    self.assertLen(self._pass(100), 5)
    with progress.bar("lm", total=100, unit="tokens", per_step=8) as advance:
      self.assertLen(self._pass(100), 5)
      advance(10)
      self.assertLen(self._pass(100), 5)
    self.assertEqual(self.out.getvalue(), "")

  def test_says_what_it_waits_for_and_how_far_it_is(self):
    with progress.bar("lm", total=100, unit="tokens", per_step=8) as advance:
      advance(0)
      self.assertEqual(self._pass(20), ["lm: compiling, 20 s so far"])
      self.clock.now += 9
      self._compile(29.0)
      self.assertEndsWith(self.err.getvalue(), "lm: compiled in 31 s\n")
      self.assertEqual(self._pass(20), ["lm: working, 49 s so far"])
      progress.show(loss=2.34567)
      advance(20)
      self.clock.now += 10
      advance(20)
      # Twenty steps in ten seconds, so that twenty more may come just now.
      self.assertEqual(
          self._pass(10),
          ["lm: 40 of 100, loss 2.346, 16 tokens/s, 0:20 left"],
      )
    self.assertEndsWith(
        self.err.getvalue(),
        "lm: done in 69.0 s, loss 2.346, 16 tokens/s\n",
    )

  def test_speed_falls_when_steps_are_overdue(self):
    with progress.bar("lm", total=1000, unit="steps") as advance:
      advance(100)
      self.clock.now += 200
      advance(100)
      progress.heard()
      lines = [self._pass(100)[-1] for _ in range(4)]
    # Known after 200 s: 100 steps, then as if 200 had been taken by now.
    rates = ["0.5", "0.5", "0.4", "0.333"]
    # Of the 800 steps to come 100 may be there any moment.
    left = ["25:00", "23:20", "29:10", "35:00"]
    self.assertEqual(
        lines,
        [
            f"lm: 200 of 1,000, {rate} steps/s, {clock} left"
            for rate, clock in zip(rates, left, strict=True)
        ],
    )

  def test_steps_of_before_a_resume_and_compilation_are_no_speed(self):
    with progress.bar("lm", total=100, unit="steps") as advance:
      advance(80)
      self.clock.now += 30
      self._compile(29.0)
      self.clock.now += 1
      advance(5)
      self.clock.now += 10
      advance(5)
      self.clock.now += 10
      self.assertEqual(
          self._pass(1), ["lm: 90 of 100, 0.476 steps/s, 0:10 left"]
      )

  def test_rows_that_were_there_are_no_speed_though_told_one_by_one(self):
    with progress.bar("rows", total=57, unit="rows") as advance:
      for _ in range(22):
        advance(1)
        self.clock.now += 0.001
      self.clock.now += 60
      advance(1)
      self.clock.now += 600
      # Of 34 rows one may be there any moment: 33 at two in 661 s.
      self.assertEqual(
          self._pass(1), ["rows: 23 of 57, 0.00303 rows/s, 3:01:47 left"]
      )

  def test_a_small_program_is_not_worth_a_line(self):
    with progress.bar("lm", total=100, unit="steps"):
      self._compile(0.5)
    self.assertEqual(self.err.getvalue().splitlines(), ["lm: done in 0.0 s"])

  def test_the_innermost_work_is_told_and_other_hosts_are_silent(self):
    with progress.bar("outer", total=2, unit="steps"):
      with progress.bar("inner", total=2, unit="steps"):
        self.assertStartsWith(self._pass(20)[0], "inner")
      self.assertStartsWith(self._pass(20)[0], "outer")
    progress.set_main(False)
    with progress.bar("outer", total=2, unit="steps"):
      self.assertEmpty(self._pass(40))
    progress.say("a setting")
    self.assertNotIn("a setting", self.err.getvalue())

  def test_what_the_script_writes_itself_counts(self):
    self._pass(15)
    progress.heard()
    self.assertEmpty(self._pass(15))

  def test_a_closed_stderr_ends_nothing(self):
    self.err.close()
    progress.say("a line")


class WatchTest(absltest.TestCase):

  def test_a_thread_ticks_until_the_end(self):
    err = io.StringIO()
    with (
        mock.patch.object(progress, "EVERY", 0.02),
        contextlib.redirect_stderr(err),
    ):
      with progress.watch():
        until = time.monotonic() + 20
        while "working" not in err.getvalue() and time.monotonic() < until:
          time.sleep(0.01)
      said = err.getvalue()
      time.sleep(0.1)
    self.assertRegex(said, r"^working, \d+ s so far\n")
    self.assertEqual(err.getvalue(), said)

  def test_a_script_is_watched_from_its_imports_on(self):
    # As `python -m launch.NAME` begins, with imports that last for two periods.
    slow = """
import sys, time
from scansnap_jax.experiment import progress
progress.EVERY = 0.4
sys.argv = ["-m"]
import launch
time.sleep(1)
print("imported", file=sys.stderr)
with progress.watch():
  pass
time.sleep(1)
"""
    said = subprocess.run(
        [sys.executable, "-c", slow],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stderr.splitlines()
    self.assertEqual(said[-1], "imported")
    self.assertRegex(said[0], r"^working, \d s so far$")


if __name__ == "__main__":
  absltest.main()
