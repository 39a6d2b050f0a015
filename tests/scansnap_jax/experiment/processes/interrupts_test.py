import contextlib
import fcntl
import os
import pathlib
import signal
import subprocess
import sys
import time

from absl.testing import absltest
from absl.testing import parameterized
import pytest

from scansnap_jax.experiment.processes import interrupts

_ROOT = pathlib.Path(__file__).parents[4]
_START = """
import signal, sys, time
from scansnap_jax.experiment.processes import interrupts
interrupts.install()
print("ready", flush=True)
"""
_PLACES = {
    "plain": "time.sleep(60)",
    "what catches everything": (
        """
while True:
  try:
    time.sleep(60)
  except BaseException:
    pass
"""
    ),
    "a call into C": (
        """
import hashlib
hashlib.pbkdf2_hmac("sha512", b"a", b"b", 2_000_000_000)
"""
    ),
    "a thread's end": (
        """
import threading
threading.Thread(target=time.sleep, args=(60,)).start()
"""
    ),
}


class LeaveTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    # A shell that starts the tests in the background has SIGINT ignored, nohup
    # SIGHUP, and what is ignored stays so in those that the tests start.
    for number in (signal.SIGINT, signal.SIGHUP):
      before = signal.signal(number, signal.SIG_DFL)
      self.addCleanup(signal.signal, number, before)

  def _start(self, *command):
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=_ROOT,
        text=True,
    )
    self.addCleanup(process.stdout.close)
    self.addCleanup(process.stderr.close)
    self.addCleanup(process.kill)
    return process

  @parameterized.product(
      place=list(_PLACES),
      number=[signal.SIGINT, signal.SIGTERM, signal.SIGHUP],
  )
  def test_wherever_it_is_the_process_ends_in_one_line(self, place, number):
    process = self._start("-c", _START + _PLACES[place])
    self.assertEqual(process.stdout.readline(), "ready\n")
    time.sleep(0.2)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    self.assertEqual(process.returncode, 128 + number)
    name = "Ctrl-C" if number == signal.SIGINT else f"SIG{number.name[3:]}"
    self.assertEqual(said, f"stopped by {name}.\n")

  def test_who_holds_a_signal_back_decides(self):
    hold = """
seen = []
previous = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
signal.raise_signal(signal.SIGTERM)
time.sleep(0.5)
print(seen, flush=True)
signal.signal(signal.SIGTERM, previous)
signal.raise_signal(signal.SIGTERM)
print("never")
"""
    process = self._start("-c", _START + hold)
    out, said = process.communicate(timeout=30)
    self.assertEqual(out, "ready\n[15]\n")
    self.assertEqual((process.returncode, said), (143, "stopped by SIGTERM.\n"))

  def test_a_signal_that_was_ignored_stays_so(self):
    ignored = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    ends = "signal.raise_signal(signal.SIGINT); print('here')"
    process = self._start("-c", ignored + _START + ends)
    self.assertEqual(process.communicate(timeout=30)[0], "ready\nhere\n")

  @parameterized.parameters(signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
  def test_a_script_that_is_done_ends_well(self, number):
    # Python clears a module's names after it has let go of its handlers.
    leaves = f"""
class Last:
  def __del__(self, kill=signal.raise_signal):
    kill({int(number)})

last = Last()
"""
    process = self._start("-c", _START + leaves)
    _, said = process.communicate(timeout=30)
    self.assertEqual((process.returncode, said), (0, ""))

  @parameterized.parameters(0.5, 1.0)
  @pytest.mark.by_default(0)
  def test_a_script_is_guarded_from_its_imports_on(self, seconds):
    workdir = self.create_tempdir().full_path + "/run"
    process = self._start("-m", "launch.scansnap", f"--workdir={workdir}")
    time.sleep(seconds)  # It imports now, and would then train for a minute.
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    self.assertEqual((process.returncode, said), (130, "stopped by Ctrl-C.\n"))


class StreamsTest(parameterized.TestCase):

  @parameterized.parameters(((2,),), ((0, 1),), ((0, 2),), ((0, 1, 2),))
  def test_a_closed_stream_is_nowhere_and_no_file_gets_its_number(self, closed):
    with contextlib.ExitStack() as stack:
      for number in closed:
        kept = fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 3)
        stack.callback(os.close, kept)
        stack.callback(os.dup2, kept, number)
      for number in closed:
        os.close(number)
      interrupts.open_closed_streams()
      nowhere = os.stat(os.devnull).st_rdev
      for number in closed:
        self.assertEqual(os.fstat(number).st_rdev, nowhere)
        self.assertTrue(os.get_inheritable(number))  # By child processes.
        self.assertEqual((os.read(number, 1), os.write(number, b"a")), (b"", 1))


if __name__ == "__main__":
  absltest.main()
