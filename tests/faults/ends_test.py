"""Runs that are killed or stopped at random moments come to the same end.

  python -m pytest tests/faults/ends_test.py -m slow -s

starts a run 70 times: of each of three loops, with one process and, where
there are several, with two. Each is sent SIGKILL (50) or SIGTERM (20) at a
random moment, is resumed by the same command, and has to end with the
checksums and the summary of a run that nobody disturbed. `-k` runs a part.

Moments follow the run's own progress, as a start may take any time: a third
come before the first checkpoint, the others up to half a second behind a
checkpoint that is drawn, in the middle of steps and of saves.
"""

import json
import os
import pathlib
import shutil
import signal
import time

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
import pytest

from tests.faults import attacks
from tests.faults import scripts
from tests.faults import workdirs

_SEED = 23
_LAST = 24
_STEPS = (f"--num_steps={_LAST}", "--log_every=2", "--checkpoint_every=2")
_RUNS = {
    "scansnap": (
        *("launch.scansnap", *scripts.SCANSNAP, *_STEPS),
        "--data.classes_file=classes.npz",
    ),
    "joma": (
        "launch.joma",
        *scripts.TABLE1,
        *(step.replace("--", "--table1.") for step in _STEPS),
    ),
    "train_lm": (
        *("launch.train_lm", *scripts.TRAIN_LM, *_STEPS, "--eval_every=2"),
        *("--map_steps=0,4", "--corpus=text.txt", "--batch_size=4"),
        *("--eval_batch_size=4",),
    ),
}
# The study of JoMA's Table 1 is one process's.
_CASES = (
    *(("scansnap", 1), ("scansnap", 2), ("joma", 1)),
    *(("train_lm", 1), ("train_lm", 2)),
)
_KILLS, _STOPS = 10, 4
_LOST = 75
_PATIENCE = 240


class EndsTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.zygote = self.enterContext(attacks.Zygote())
    self.tally = attacks.Tally()

  def _start(self, loop, number, cwd, more=()):
    cwd.mkdir(exist_ok=True)
    (cwd / "text.txt").write_text(scripts.TEXT)
    if not (cwd / "classes.npz").exists():
      scripts.save_classes(cwd / "classes.npz")
    module, *argv = _RUNS[loop]
    argv += ["--workdir=run", "--num_cpu_devices=1", *more]
    return self.zygote.start_processes(
        number, module, argv, cwd=cwd, hooks=["undrawn"], cpu_s=600
    )

  def _disturb(self, started, cwd, moment, number):
    """Sends a signal, maybe to one of two, at a moment; returns to which."""
    steps, delay, victim = moment
    until = time.monotonic() + _PATIENCE
    while _num_saved(cwd) < steps and time.monotonic() < until:
      if any(attacks.is_gone(one) for one in started):
        break
      time.sleep(0.01)
    time.sleep(delay)
    victims = started if victim is None else [started[victim % len(started)]]
    for one in victims:
      one.kill(number)
    return [one in victims for one in started]

  def _attack(self, loop, processes, number, undisturbed, moment):
    cwd = self.folder / "attacked"
    started = self._start(loop, processes, cwd)
    is_victim = self._disturb(started, cwd, moment, number)
    saved = _num_saved(cwd)
    ended = [one.end(_PATIENCE) for one in started]
    kind = f"{loop}, {processes}, {signal.Signals(number).name}"
    for one, is_it in zip(ended, is_victim, strict=True):
      outcome = _outcome(one, number, is_it)
      self.tally.add(f"{kind}: processes", f"{moment}", one, outcome)
    again = [one.end(_PATIENCE) for one in self._start(loop, processes, cwd)]
    outcomes = [one.outcome for one in again]
    outcome = attacks.RIGHT
    if any(one != attacks.RIGHT for one in outcomes):
      outcome = next(one for one in outcomes if one != attacks.RIGHT)
    elif workdirs.end_of(cwd / "run", _LAST) != undisturbed:
      outcome = attacks.SILENT
    name = f"moment {moment}, {saved} steps were saved"
    self.tally.add(f"{kind}: ends", name, again[0], outcome)
    self.assertIn(outcome, (attacks.RIGHT, attacks.SILENT, attacks.TRACEBACK))
    shutil.rmtree(cwd)

  @parameterized.parameters(
      *((*case, int(signal.SIGKILL), _KILLS) for case in _CASES),
      *((*case, int(signal.SIGTERM), _STOPS) for case in _CASES),
  )
  @pytest.mark.slow
  @pytest.mark.timeout(3600)
  def test_they_end_as_the_undisturbed(self, loop, processes, number, times):
    whole = self.folder / "whole"
    for one in self._start(loop, processes, whole):
      ended = one.end(_PATIENCE)
      self.assertEqual(ended.status, 0, ended.err)
    undisturbed = workdirs.end_of(whole / "run", _LAST)
    self.assertIsNotNone(undisturbed)
    random = np.random.default_rng([_SEED, processes, number, len(loop)])
    for count in range(times):
      moment = _moment(random, count, _num_saved(whole))
      self._attack(loop, processes, number, undisturbed, moment)
    wrong = attacks.report(self.tally, f"{loop}, {processes} processes")
    self.assertEmpty(wrong, wrong)

  @parameterized.parameters(
      # Evaluations come in time, and one that comes never.
      (("--grace=60",), 60, "Stopped in "),
      (
          ("--grace=2", "--log_every=100000", "--checkpoint_every=100000"),
          2,
          "stopped by SIGTERM: no evaluation, .* came within --grace=2 s.",
      ),
  )
  @pytest.mark.slow
  @pytest.mark.timeout(900)
  def test_a_trainer_ends_within_its_grace(self, more, grace, said):
    cwd = self.folder / "run"
    long = ("--num_steps=10000000", "--eval_every=100000", "--map_steps=0")
    (one,) = self._start("train_lm", 1, cwd, (*long, *more))
    until = time.monotonic() + _PATIENCE
    # The first row is that of step 0; the steps are compiled after it.
    rows = cwd / "run" / "metrics.jsonl"
    while not rows.exists() and time.monotonic() < until:
      time.sleep(0.01)
    time.sleep(20)
    one.kill(signal.SIGTERM)
    started = time.monotonic()
    ended = one.end(_PATIENCE)
    # And what a busy machine takes to end a process.
    self.assertLess(time.monotonic() - started, grace + 10)
    self.assertEqual(ended.status, 143, ended.err)
    self.assertRegex(ended.err, said)
    self.assertNotIn("Traceback", ended.err)

  @parameterized.parameters(2, 4)
  @pytest.mark.slow
  @pytest.mark.timeout(900)
  def test_losses_of_several_processes_are_those_of_one(self, processes):
    curves = []
    for number in (1, processes):
      cwd = self.folder / f"of_{number}"
      for one in self._start("train_lm", number, cwd):
        ended = one.end(_PATIENCE)
        self.assertEqual(ended.status, 0, ended.err)
      lines = (cwd / "run" / "metrics.jsonl").read_text().splitlines()
      rows = [json.loads(line) for line in lines]
      self.assertEqual([row["step"] for row in rows][-1], _LAST)
      curves.append([[r["valid_loss"], r["train_loss"]] for r in rows[1:]])
    self.assertGreater(np.ptp(curves[0]), 1e-3)  # It learns.
    np.testing.assert_allclose(curves[1], curves[0], rtol=0, atol=1e-5)


def _moment(random, count, most):
  """Checkpoints to wait for, seconds after that, and who: None is all."""
  steps = 0 if count % 3 == 0 else int(random.integers(1, most))
  delay = random.uniform(0, 5.0 if not steps else 0.5)
  victim = None if count % 4 == 3 else int(random.integers(2))
  return steps, float(delay), victim


def _num_saved(cwd):
  """Checkpoints that were begun, of all settings of a loop."""
  # `walk`, for folders that are being written leave while they are looked at.
  return sum(
      "metadata" in files
      and pathlib.Path(folder).name == "digest"
      and not pathlib.Path(folder).parent.name.endswith("tmp")
      for folder, _, files in os.walk(cwd / "run" / "checkpoints")
  )


def _outcome(ended, number, is_victim):
  """What a process of a disturbed run should come to."""
  if ended.is_late:
    return attacks.HANG
  if "Traceback" in ended.err:
    return attacks.TRACEBACK
  if ended.status == 0:  # It was done before.
    return attacks.RIGHT
  if number == signal.SIGTERM:
    right = (143,)
  else:
    right = (-signal.SIGKILL,) if is_victim else (_LOST,)
  # A peer that was killed early never came.
  return attacks.RIGHT if ended.status in right else ended.outcome


if __name__ == "__main__":
  absltest.main()
