import contextlib
import io
import os
import pathlib
import signal
import subprocess
import sys
import threading
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax.experimental import multihost_utils
import numpy as np
import pytest

from scansnap_jax.experiment.processes import preemption

_ROOT = pathlib.Path(__file__).parents[4]
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

_KILL_TWICE = """
import os, signal
from scansnap_jax.experiment.processes import preemption
with preemption.stop_requests() as stop_requested:
  for _ in range(2):
    os.kill(os.getpid(), signal.SIGTERM)
    print("alive", stop_requested(), flush=True)
"""

# The thread that waits for signals is late: the main thread keeps the
# interpreter until the handler of the loop has gone.
_LATE_THREAD = """
import os, signal, sys, time
from scansnap_jax.experiment.processes import interrupts
from scansnap_jax.experiment.processes import preemption
interrupts.install()
sys.setswitchinterval(60)
with preemption.stop_requests() as stop_requested:
  for _ in range(int(sys.argv[1])):
    os.kill(os.getpid(), signal.SIGTERM)
    while not stop_requested():
      pass
    time.sleep(0.2)
  print("saved", flush=True)
"""

_SLOW_TO_SAVE = """
import os, signal, sys, time
from scansnap_jax.experiment.processes import interrupts
from scansnap_jax.experiment.processes import preemption
interrupts.install()
preemption.set_grace(float(sys.argv[1]))
with preemption.stop_requests() as stop_requested:
  os.kill(os.getpid(), signal.SIGTERM)
  time.sleep(1.5)
time.sleep(0.2)
print("saved", flush=True)
"""


def _send(number):
  os.kill(os.getpid(), number)


class StopRequestsTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    # What a test sends is not what stopped anything in the next one.
    self.enterContext(
        mock.patch.object(preemption, "_last_signal", signal.SIGTERM)
    )
    self.usual = []
    note = lambda number, _: self.usual.append(number)
    for number in _SIGNALS:
      self.addCleanup(signal.signal, number, signal.signal(number, note))
    self.before = [signal.getsignal(number) for number in _SIGNALS]

  def assertHandlersAreRestored(self):
    after = [signal.getsignal(number) for number in _SIGNALS]
    self.assertEqual(after, self.before)

  def test_nothing_is_requested_without_a_signal(self):
    with preemption.stop_requests() as stop_requested:
      self.assertFalse(stop_requested())
    self.assertFalse(stop_requested())
    self.assertHandlersAreRestored()

  @parameterized.parameters(*_SIGNALS)
  def test_signal_is_noted_and_not_acted_on(self, number):
    with preemption.stop_requests() as stop_requested:
      _send(number)
      self.assertTrue(stop_requested())
      self.assertTrue(stop_requested())  # It is not forgotten.
    self.assertEmpty(self.usual)

  @parameterized.parameters(*_SIGNALS)
  def test_second_signal_of_a_kind_acts_as_usual(self, number):
    with preemption.stop_requests() as stop_requested:
      _send(number)
      self.assertEmpty(self.usual)
      _send(number)
      self.assertEqual(self.usual, [number])
      self.assertTrue(stop_requested())
    self.assertHandlersAreRestored()

  @parameterized.parameters((_SIGNALS,), (_SIGNALS[::-1],))
  def test_kinds_are_held_apart(self, numbers):
    with preemption.stop_requests():
      for number in numbers:
        _send(number)
      self.assertEmpty(self.usual)

  @parameterized.parameters(*_SIGNALS)
  def test_a_signal_that_was_ignored_stays_so(self, number):
    """As nohup has SIGHUP, and a shell SIGINT of what it starts with &."""
    signal.signal(number, signal.SIG_IGN)
    with preemption.stop_requests() as stop_requested:
      _send(number)
      self.assertFalse(stop_requested())
    self.assertIs(signal.getsignal(number), signal.SIG_IGN)

  def test_second_ctrl_c_interrupts(self):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with self.assertRaises(KeyboardInterrupt):
      with preemption.stop_requests() as stop_requested:
        _send(signal.SIGINT)
        self.assertTrue(stop_requested())
        _send(signal.SIGINT)
    self.assertIs(signal.getsignal(signal.SIGINT), signal.default_int_handler)

  def test_second_sigterm_kills(self):
    process = subprocess.run(
        [sys.executable, "-c", _KILL_TWICE],
        capture_output=True,
        text=True,
        cwd=_ROOT,
        check=False,
    )
    self.assertEqual(process.returncode, -signal.SIGTERM, process.stderr)
    self.assertEqual(process.stdout, "alive True\n")

  @parameterized.parameters(
      ("0.3", 143, "stopped by SIGTERM: no evaluation, .* --grace=0.3 s. The"),
      ("30", 0, ""),
      ("0", 0, ""),
  )
  @pytest.mark.by_default(0)
  def test_a_run_that_does_not_come_to_save_ends_in_time(
      self, grace, status, said
  ):
    process = subprocess.run(
        [sys.executable, "-c", _SLOW_TO_SAVE, grace],
        capture_output=True,
        text=True,
        cwd=_ROOT,
        check=False,
    )
    self.assertEqual(process.returncode, status, process.stderr)
    self.assertRegex(process.stderr, f"^{said}")
    self.assertEqual(process.stdout, "" if status else "saved\n")

  def test_evaluations_far_apart_are_said_once(self):
    said = io.StringIO()
    times = iter([0.0, 5.0, 16.0, 40.0, 80.0])
    self.addCleanup(preemption.set_grace, 0)
    with (
        preemption.stop_requests() as stop_requested,
        mock.patch.object(preemption.time, "monotonic", lambda: next(times)),
        contextlib.redirect_stderr(said),
    ):
      preemption.set_grace(10)
      for _ in range(5):
        self.assertFalse(preemption.on_any_process(stop_requested()))
    self.assertEqual(said.getvalue().count("\n"), 1)
    self.assertRegex(said.getvalue(), "are 11 s apart, more than --grace=10: ")

  def test_without_a_grace_nothing_is_said(self):
    said = io.StringIO()
    times = iter([0.0, 1e6])
    with (
        preemption.stop_requests() as stop_requested,
        mock.patch.object(preemption.time, "monotonic", lambda: next(times)),
        contextlib.redirect_stderr(said),
    ):
      for _ in range(2):
        self.assertFalse(preemption.on_any_process(stop_requested()))
    self.assertEqual(said.getvalue(), "")

  @parameterized.parameters((1, 0, "saved\n"), (2, 143, ""))
  @pytest.mark.by_default(0)
  def test_a_signal_that_was_noted_ends_nothing_later(self, times, code, out):
    process = subprocess.run(
        [sys.executable, "-c", _LATE_THREAD, str(times)],
        capture_output=True,
        text=True,
        cwd=_ROOT,
        check=False,
        timeout=60,
    )
    self.assertEqual((process.returncode, process.stdout), (code, out))

  @parameterized.parameters(0, 1)
  def test_handlers_are_restored_after_an_error(self, num_signals):
    with self.assertRaisesRegex(RuntimeError, "^mine$"):
      with preemption.stop_requests():
        for _ in range(num_signals):
          _send(signal.SIGTERM)
        raise RuntimeError("mine")
    self.assertHandlersAreRestored()

  def test_signals_after_the_block_are_not_noted(self):
    with preemption.stop_requests() as stop_requested:
      pass
    _send(signal.SIGTERM)
    self.assertFalse(stop_requested())
    self.assertEqual(self.usual, [signal.SIGTERM])

  def test_every_block_starts_anew(self):
    with preemption.stop_requests():
      _send(signal.SIGTERM)
    with preemption.stop_requests() as stop_requested:
      self.assertFalse(stop_requested())
      _send(signal.SIGTERM)
      self.assertTrue(stop_requested())
    self.assertEmpty(self.usual)

  def test_another_thread_holds_nothing_and_is_told_nothing(self):
    is_inside, may_leave = threading.Event(), threading.Event()
    answers, seen = [], []

    def hold():
      with preemption.stop_requests() as stop_requested:
        is_inside.set()
        may_leave.wait(10)
        answers.append(stop_requested())
      seen.append("left")

    thread = threading.Thread(target=hold)
    thread.start()
    self.assertTrue(is_inside.wait(10))
    self.assertHandlersAreRestored()  # They were never replaced.
    _send(signal.SIGTERM)
    may_leave.set()
    thread.join()
    self.assertEqual((answers, seen), ([False], ["left"]))
    self.assertEqual(self.usual, [signal.SIGTERM])


class OnAnyProcessTest(parameterized.TestCase):

  @parameterized.parameters(False, True)
  def test_one_process_asks_nobody(self, requested):
    with mock.patch.object(multihost_utils, "process_allgather") as gather:
      self.assertIs(preemption.on_any_process(requested), requested)
    gather.assert_not_called()

  @parameterized.product(
      mine=(False, True), others=((False, False), (False, True))
  )
  def test_one_of_many_is_enough(self, mine, others):
    gather = lambda value: np.array([value, *others])
    with (
        mock.patch.object(jax, "process_count", return_value=3),
        mock.patch.object(multihost_utils, "process_allgather", gather),
    ):
      self.assertIs(preemption.on_any_process(mine), mine or any(others))


if __name__ == "__main__":
  absltest.main()
