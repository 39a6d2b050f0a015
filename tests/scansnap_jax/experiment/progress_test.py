import contextlib
import functools
import io
import os
import pathlib
import pty
import re
import subprocess
import sys

from absl.testing import absltest
from absl.testing import parameterized

from scansnap_jax.experiment import progress

_ROOT = pathlib.Path(__file__).parents[3]

# A hundred runs of 50 steps: five at up to 10 runs/s, then the rest at once.
_PACE = 0.1
_SHOW = f"""
import time
from scansnap_jax.experiment import progress
name = "figure9 [/] [red]x :smile: {{}}"  # A name of the user's, as it is.
with progress.bar(name, num_runs=100, steps_per_run=50) as on_progress:
  for _ in range(5):
    time.sleep({_PACE})
    on_progress(50)
  time.sleep({_PACE})
  on_progress(50 * 95)
"""
_FRAME = re.compile(
    r"figure9 \[/\] \[red\]x :smile: \{\} +\S+ +(\d+)% +(--|[\d.e+]+) runs/s"
    r" +(\d+:\d\d:\d\d|-:--:--)"
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
  """Yields percentage, runs/s and seconds left of every redraw, or None."""
  plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", written)
  for percent, rate, left in _FRAME.findall(plain):
    seconds = None
    if left[0] != "-":
      hours, minutes, rest = map(int, left.split(":"))
      seconds = 3600 * hours + 60 * minutes + rest
    yield int(percent), None if rate == "--" else float(rate), seconds


class BarTest(parameterized.TestCase):

  def test_is_silent_where_stderr_is_no_terminal(self):
    err, out = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
      with progress.bar("name", num_runs=2, steps_per_run=3) as on_progress:
        for num_run_steps in (0, 4, 2):
          self.assertIsNone(on_progress(num_run_steps))
    self.assertEqual((err.getvalue(), out.getvalue()), ("", ""))

  def test_goes_to_stderr_and_leaves_stdout_to_the_program(self):
    code, printed, written = _on_a_terminal()
    self.assertEqual((code, printed), (0, b""), written)
    self.assertIn("figure9", written)

  def test_starts_without_a_rate_and_reaches_a_hundred_percent(self):
    frames = [*_frames(_on_a_terminal()[2])]
    self.assertEqual(frames[0], (0, None, None))
    percent, _, left = frames[-1]
    self.assertEqual((percent, left), (100, 0))

  def test_rate_is_in_runs_and_fits_the_remaining_time(self):
    on_the_way = [
        frame
        for frame in _frames(_on_a_terminal()[2])
        if frame[1] is not None and frame[0] < 100
    ]
    self.assertNotEmpty(on_the_way)
    for percent, rate, left in on_the_way:
      # Not faster than the pace; a busy machine may be much slower.
      self.assertBetween(rate, 0.1, 1 / _PACE)
      # The rate has three digits, the time is rounded up to seconds.
      expected = (100 - percent) / rate
      self.assertBetween(left, 0.99 * expected, 1.01 * expected + 1)

  def test_gives_the_cursor_back(self):
    _, _, written = _on_a_terminal()
    self.assertIn("\x1b[?25l", written)
    self.assertGreater(written.rfind("\x1b[?25h"), written.rfind("\x1b[?25l"))


if __name__ == "__main__":
  absltest.main()
