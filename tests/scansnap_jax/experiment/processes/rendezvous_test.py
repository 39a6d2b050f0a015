from concurrent import futures
import contextlib
import io
import json
import pathlib
import signal
import socket
import subprocess
import sys
import time
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import pytest

from scansnap_jax.experiment import errors
from scansnap_jax.experiment.processes import rendezvous

_ROOT = pathlib.Path(__file__).parents[4]

_PEER = """
import os, signal, sys, time
from scansnap_jax.experiment.processes import interrupts
from scansnap_jax.experiment.processes import rendezvous
interrupts.install()
address, count, index = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
peers = rendezvous.meet(address, count, index, timeout=float(sys.argv[7]))
print("met", peers.gather(peers.index), flush=True)
time.sleep(float(sys.argv[4]))
if sys.argv[5] == "signal":
  os.kill(os.getpid(), signal.SIGTERM)
  time.sleep(60)
if sys.argv[5] == "hangs":
  os.kill(os.getpid(), signal.SIGSTOP)
if sys.argv[5] == "fails":
  with rendezvous.heard_out(peers):
    raise RuntimeError("Connection reset by peer")
if sys.argv[5] == "leaves":
  peers.leave()
  time.sleep(float(sys.argv[6]))
"""


def _free_address():
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return f"127.0.0.1:{probe.getsockname()[1]}"


def _meet_all(given, address=None, timeout=10, then=lambda peers: peers):
  """Meets in a thread a process; returns what came of each, errors too."""
  address = address or _free_address()

  def meet(index, count):
    try:
      return then(rendezvous.meet(address, count, index, timeout=timeout))
    except errors.UserError as error:
      return str(error)

  with futures.ThreadPoolExecutor(len(given)) as pool:
    started = [pool.submit(meet, *one) for one in given]
    return [one.result(timeout=60) for one in started]


class MeetTest(parameterized.TestCase):

  @parameterized.parameters(1, 2, 5)
  def test_all_gather_what_each_gave(self, count):
    def ask(peers):
      values = [peers.gather(peers.index * 10), peers.gather(None)]
      peers.leave()
      return values

    found = _meet_all([(index, count) for index in range(count)], then=ask)
    self.assertEqual(
        found, [[[*range(0, 10 * count, 10)], [None] * count]] * count
    )

  def test_the_port_is_free_again(self):
    address = _free_address()
    leave = lambda peers: peers.leave() or peers
    for _ in range(2):
      _meet_all([(0, 2), (1, 2)], address, then=leave)
      with socket.create_server(("", int(address.rpartition(":")[2]))):
        pass

  def test_an_id_given_twice_is_told_to_all(self):
    found = _meet_all([(0, 3), (1, 3), (1, 3)])
    self.assertLen(set(found), 1)
    self.assertIn("two processes have the id 1", found[0])

  def test_unlike_counts_are_told_to_all(self):
    found = _meet_all([(0, 2), (1, 3)])
    self.assertEqual(
        found,
        [
            "process 1 was started as one of 3 processes, and process 0 as one"
            " of 2."
        ]
        * 2,
    )

  @parameterized.parameters(-1, 2, 7)
  def test_an_id_out_of_range_is_refused_at_once(self, index):
    (found,) = _meet_all([(index, 2)])
    self.assertIn(f"process id {index} is out of range", found)

  @parameterized.parameters("host", "host:", ":80", "host:x", "host:99999")
  def test_an_address_is_host_and_port(self, address):
    (found,) = _meet_all([(0, 2)], address)
    self.assertIn(f"must be HOST:PORT, got '{address}'", found)

  def test_an_unknown_host_is_named(self):
    with mock.patch.object(
        socket, "create_connection", side_effect=socket.gaierror(8, "no such")
    ):
      (found,) = _meet_all([(1, 2)], "nowhere.invalid:80")
    self.assertIn("host nowhere.invalid is not known: no such", found)

  def test_a_port_that_is_taken_is_named(self):
    with socket.create_server(("", 0)) as other:
      port = other.getsockname()[1]
      (found,) = _meet_all([(0, 2)], f"127.0.0.1:{port}")
    self.assertIn(f"port {port} of the coordinator cannot be opened", found)

  @parameterized.parameters(0, 1)
  def test_a_wait_is_said_and_ends(self, index):
    said = io.StringIO()
    address = _free_address()
    with (
        mock.patch.object(rendezvous, "_PATIENCE", 0.2),
        contextlib.redirect_stderr(said),
    ):
      (found,) = _meet_all([(index, 2)], address, timeout=1)
    waiting = f"1 of 2 processes at {address}"
    self.assertEqual(said.getvalue(), f"waiting for {waiting}, up to 1 s\n")
    self.assertStartsWith(found, f"{waiting} did not come within 1 s.")

  def test_a_stranger_at_the_port_is_nobody(self):
    address = _free_address()
    host, _, port = address.rpartition(":")

    def knock(_):
      for _ in range(50):
        with contextlib.suppress(OSError):
          with socket.create_connection((host, int(port)), timeout=1) as sock:
            sock.sendall(b"GET / HTTP/1.1\n")
          return
        time.sleep(0.1)

    with futures.ThreadPoolExecutor(1) as pool:
      pool.submit(knock, None)
      with futures.ThreadPoolExecutor(1) as other:
        first = other.submit(rendezvous.meet, address, 2, 0, timeout=20)
        time.sleep(0.5)
        second = rendezvous.meet(address, 2, 1, timeout=20)
        first = first.result(timeout=20)
    for peers in (first, second):
      peers.leave()


class CompareTest(parameterized.TestCase):

  @parameterized.parameters(
      ({"--lr": 1}, {"--lr": 2}, "--lr is 1 on process 0 and 2 on process 1"),
      ({"--lr": 1}, {}, "--lr is 1 on process 0 and None on process 1"),
      ({}, {"--b": "x"}, "--b is None on process 0 and 'x' on process 1"),
  )
  def test_all_name_what_differs(self, first, second, expected):
    def compare(peers):
      try:
        peers.compare((first, second)[peers.index])
      finally:
        peers.leave()

    found = _meet_all([(0, 2), (1, 2)], then=compare)
    self.assertEqual(found[0], found[1])
    self.assertStartsWith(found[0], expected)

  def test_equal_facts_pass(self):
    def compare(peers):
      peers.compare({"--lr": 1})
      peers.leave()
      return "went on"

    found = _meet_all([(0, 2), (1, 2)], then=compare)
    self.assertEqual(found, ["went on"] * 2)


class SilenceTest(absltest.TestCase):
  """A peer is a socket here, which the test holds the other end of."""

  def setUp(self):
    super().setUp()
    mine, self.peer = socket.socketpair()
    self.enterContext(self.peer)
    # It listens in this test's thread alone.
    with mock.patch.object(rendezvous.threading, "Thread"):
      self.peers = rendezvous.Peers(1, [mine], timeout=0.4)
    self.addCleanup(mine.close)
    self.lines = self.peers._lines(0, mine)

  def test_silence_is_known_at_half_the_time(self):
    self.assertFalse(self.peers.is_one_silent)
    self.peers._silence[0] = 0.19
    self.assertFalse(self.peers.is_one_silent)
    self.peers._silence[0] = 0.21
    self.assertTrue(self.peers.is_one_silent)

  def test_silence_ends_the_wait(self):
    self.assertIsNone(next(self.lines))
    self.assertGreaterEqual(self.peers._silence[0], 0.4)

  def test_two_short_silences_are_no_long_one(self):
    self.peers._silence[0] = 0.3
    self.peer.sendall(b"one\n")
    self.assertEqual(next(self.lines), b"one")
    self.assertEqual(self.peers._silence[0], 0.0)


class LostTest(parameterized.TestCase):

  def _run(self, *peers, suspend=None):
    address = _free_address()
    started = [
        subprocess.Popen(
            [sys.executable, "-c", _PEER, address, str(len(peers)), str(i)]
            + [*p, *["20"][len(p) - 3 :]],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=_ROOT,
            text=True,
        )
        for i, p in enumerate(peers)
    ]
    met = [one.stdout.readline() for one in started] if suspend else None
    if suspend:
      self._suspend(started, *suspend)
    hanging = [i for i, p in enumerate(peers) if p[1] == "hangs"]
    order = [*({*range(len(peers))} - {*hanging}), *hanging]
    ended = [("", "")] * len(peers)
    for i in order:  # One that hangs does so until all others are gone.
      if i in hanging:
        started[i].kill()
      ended[i] = started[i].communicate(timeout=60)
    codes = [process.returncode for process in started]
    for i, (out, _) in enumerate(ended):
      out = met[i] + out if met else out
      self.assertEqual(out, f"met {json.dumps([*range(len(peers))])}\n", i)
    return codes, [err for _, err in ended]

  def _suspend(self, started, after, seconds):
    """Stops all processes for a while, as a cluster does that needs room."""
    time.sleep(after)
    for process in started:
      process.send_signal(signal.SIGSTOP)
    time.sleep(seconds)
    for process in started:
      process.send_signal(signal.SIGCONT)

  @parameterized.parameters(0, 1, 2)
  def test_the_others_end_in_one_line(self, lost):
    peers = [("30", "leaves", "0")] * 3
    peers[lost] = ("0.2", "dies", "0")
    codes, said = self._run(*peers)
    self.assertEqual(codes[lost], 0)
    for index in {0, 1, 2} - {lost}:
      self.assertEqual(codes[index], rendezvous.LOST_STATUS)
      # All name the one that was lost, whom process 0 alone can see.
      self.assertRegex(
          said[index], rf"^error: process {lost} ended before .*\n$"
      )

  @parameterized.parameters(0, 2)
  @pytest.mark.by_default(1)
  def test_one_that_hangs_is_named_by_all(self, hanging):
    peers = [("60", "leaves", "0", "2")] * 3
    peers[hanging] = ("0.2", "hangs", "0", "2")
    codes, said = self._run(*peers)
    self.assertEqual(codes[hanging], -signal.SIGKILL)
    for index in {0, 1, 2} - {hanging}:
      self.assertEqual(codes[index], rendezvous.LOST_STATUS)
      self.assertRegex(
          said[index],
          rf"^error: process {hanging} gave no sign of life for 2 s"
          r" \(--multihost_timeout\): .* continues from the last"
          r" checkpoint.\n$",
      )

  @pytest.mark.slow
  def test_a_job_that_was_suspended_as_a_whole_goes_on(self):
    """Time in which a process is stopped itself is no silence of the others."""
    codes, said = self._run(
        *[("5", "leaves", "0", "2")] * 2, suspend=(0.5, 3.0)
    )
    self.assertEqual((codes, said), ([0, 0], ["", ""]))

  @parameterized.parameters(0, 1)
  def test_a_signal_to_one_ends_all_as_it_does_one(self, stopped):
    peers = [("30", "leaves", "0")] * 3
    peers[stopped] = ("0.2", "signal", "0")
    codes, said = self._run(*peers)
    self.assertEqual(codes, [143] * 3)
    self.assertEqual(said[stopped], "stopped by SIGTERM.\n")
    for index in {0, 1, 2} - {stopped}:
      self.assertRegex(said[index], r"^process \d was stopped by SIGTERM\.\n$")

  def test_a_collective_that_fails_waits_for_the_word_of_who_is_lost(self):
    codes, said = self._run(("0", "fails", "0"), ("1", "dies", "0"))
    self.assertEqual(codes, [rendezvous.LOST_STATUS, 0])
    self.assertRegex(said[0], r"^error: process 1 ended before .*\n$")

  def test_a_process_that_is_done_may_end(self):
    codes, said = self._run(
        ("1", "leaves", "0"), ("0", "leaves", "0"), ("0", "leaves", "2")
    )
    self.assertEqual((codes, said), ([0, 0, 0], ["", "", ""]))


if __name__ == "__main__":
  absltest.main()
