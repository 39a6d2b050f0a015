"""Real processes of one run, on the loopback address."""

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

from absl.testing import absltest
from absl.testing import parameterized
import pytest

from scansnap_jax.experiment.processes import rendezvous

_ROOT = pathlib.Path(__file__).parents[4]
_TRAIN = (
    *("-m", "launch.train_lm", "--num_steps=100000", "--log_every=2"),
    *("--eval_every=2", "--checkpoint_every=2", "--map_steps=0,2"),
    *("--seq_len=8", "--batch_size=4", "--eval_batch_size=2"),
    *("--probe_batches=1", "--model.num_layers=1", "--model.embed_dim=8"),
    *("--model.head_dim=4", "--model.num_heads=2", "--model.num_kv_heads=2"),
    *("--model.hidden_dim=8", "--num_cpu_devices=1"),
)
_PATIENCE = 200


def _start(workdir, num_processes, *extra):
  """Starts the processes of a run; `extra` has the flags of each."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  several = ["--multihost"] if num_processes > 1 else []
  started = []
  for index in range(num_processes):
    place = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(num_processes),
        "JAX_PROCESS_ID": str(index),
    }
    own = extra[index] if extra else ()
    started.append(
        subprocess.Popen(
            [sys.executable, *_TRAIN, f"--workdir={workdir}", *several, *own],
            env={**os.environ, **place},
            cwd=_ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    )
  return started


def _end(started):
  """Statuses and outputs of processes; one that hangs is killed."""
  ended = []
  for process in started:
    try:
      out = process.communicate(timeout=_PATIENCE)[0]
    except subprocess.TimeoutExpired:
      process.kill()
      out = "HANGS " + process.communicate()[0]
    # A slow machine says meanwhile that it is at work.
    out = re.sub(r"(?m)^working, \d+ s so far\n", "", out)
    ended.append((process.returncode, out))
  return ended


def _steps(workdir):
  folder = workdir / "checkpoints" / "lm"
  names = [p.name for p in folder.glob("*")] if folder.is_dir() else []
  return sorted(int(name) for name in names if name.isdecimal())


def _resumes(workdir):
  path = workdir / "checkpoints" / "lm" / "resumes.jsonl"
  lines = path.read_text().splitlines() if path.exists() else []
  return [json.loads(line)["step"] for line in lines]


class TwoProcessesTest(parameterized.TestCase):

  def _wait_for_checkpoint(self, workdir, started, beyond):
    """Waits until a later step than `beyond` is there, whole."""
    until = time.monotonic() + _PATIENCE
    while not any(step > beyond for step in _steps(workdir)):
      if any(p.poll() is not None for p in started) or time.monotonic() > until:
        self.fail(_end(started))
      time.sleep(0.1)

  @parameterized.parameters(2, 1)
  @pytest.mark.by_default(1)
  def test_what_is_saved_by_two_is_resumed_by(self, num_processes):
    workdir = pathlib.Path(self.create_tempdir().full_path) / "run"
    two = _start(workdir, 2)
    self._wait_for_checkpoint(workdir, two, -1)
    two[1].kill()  # The other cannot go on, and says so at once.
    (status, out), _ = _end(two)
    self.assertEqual(status, rendezvous.LOST_STATUS, out)
    self.assertIn("error: process 1 ended before the run was done", out)
    self.assertNotIn("Traceback", out)

    saved = _steps(workdir)[-1]
    again = _start(workdir, num_processes)
    self._wait_for_checkpoint(workdir, again, saved)
    again[-1].send_signal(signal.SIGTERM)
    for status, out in _end(again):
      self.assertEqual(status, 143, out)
      self.assertNotIn("DAMAGED", out)
      self.assertNotIn("Traceback", out)
    # Nothing was done twice: it went on from the newest step that was there.
    self.assertEqual(_resumes(workdir), [saved])

  def test_unlike_flags_stop_both_with_one_line(self):
    workdir = self.create_tempdir().full_path + "/run"
    ended = _end(_start(workdir, 2, ["--lr=0.1"], ["--lr=0.2"]))
    expected = (
        "error: --lr is '0.1' on process 0 and '0.2' on process 1: start all"
        " processes of a run alike.\n"
    )
    self.assertEqual(ended, [(2, expected)] * 2)
    with contextlib.suppress(FileNotFoundError):
      self.assertEmpty(os.listdir(workdir))


if __name__ == "__main__":
  absltest.main()
