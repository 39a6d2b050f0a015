"""Runs of several processes, killed at random moments and resumed.

  python -m pytest tests/faults/kills_test.py -m slow -s

kills one or all processes of a run of 2, 3 or 4, 30 times, and resumes it by 1
to 4. Work that is done twice gives the same bits, so that an end state could
not show what was lost: the step that is restored is held against the last one
that was saved whole.
"""

import json
import pathlib
import signal
import time

from absl.testing import absltest
import numpy as np
import pytest

from tests.faults import attacks
from tests.faults import scripts

_SEED = 19
_KILLS = 30
_LOST = 75  # What is left of a run says that a peer ended.
_LATEST = 9.0  # Seconds after the start.
_PATIENCE = 120
_TRAIN = (
    *(*scripts.TRAIN_LM, "--num_steps=100000", "--log_every=2"),
    *("--eval_every=2", "--checkpoint_every=2", "--map_steps=0,2"),
    *("--num_cpu_devices=1", "--corpus=text.txt", "--workdir=run"),
    *("--batch_size=12", "--eval_batch_size=12"),
)


class JudgeTest(absltest.TestCase):

  def test_what_was_saved_and_not_restored_is_lost(self):
    self.assertFalse(_lost(None, [], False))
    self.assertFalse(_lost(4, [4], False))
    self.assertFalse(_lost(4, [6], True))  # A later step came meanwhile.
    self.assertFalse(_lost(4, [], True))
    self.assertTrue(_lost(4, [], False))
    self.assertTrue(_lost(4, [2], True))

  def test_statuses_of_those_who_are_left(self):
    ended = attacks.Ended(75, False, 0, 0.0, "", "")
    self.assertEqual(_outcome(ended, False, True), attacks.RIGHT)
    self.assertEqual(_outcome(ended, False, False), attacks.SILENT)
    told = ended._replace(err="error: process 1 ended before")
    self.assertEqual(_outcome(told, False, False), attacks.SILENT)
    damaged = ended._replace(err="DAMAGED CHECKPOINT")
    self.assertEqual(_outcome(damaged, True, True), attacks.SILENT)


class KillsTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    (self.folder / "text.txt").write_text(scripts.TEXT)
    self.zygote = self.enterContext(attacks.Zygote())
    self.random = np.random.default_rng(_SEED)
    self.tally = attacks.Tally()

  def _start(self, number):
    """Starts so many processes of the run."""
    return self.zygote.start_processes(
        number, "launch.train_lm", _TRAIN, cwd=self.folder, cpu_s=600
    )

  def _steps(self):
    """Steps that were saved whole."""
    found = (self.folder / "run" / "checkpoints" / "lm").glob("[0-9]*")
    return sorted(int(p.name) for p in found if p.name.isdecimal())

  def _restored(self):
    """Steps that runs went on from, one a run."""
    path = self.folder / "run" / "checkpoints" / "lm" / "resumes.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines]

  def _wait_for_news(self, started, seconds):
    """Waits, for so long at most, until there is a later step; says if so."""
    before, until = (self._steps() or [-1])[-1], time.monotonic() + seconds
    while time.monotonic() < until and (self._steps() or [-1])[-1] <= before:
      if any(attacks.is_gone(one) for one in started):
        break
      time.sleep(0.05)

  def _try(self, number, killed):
    """Starts so many and ends them, by a kill or in good time.

    Args:
      number: Processes.
      killed: Indices of those that are killed; none lets the run save a step
        and then stop.
    """
    saved = (self._steps() or [None])[-1]
    resumes = len(self._restored())
    started = self._start(number)
    if killed:
      time.sleep(self.random.uniform(0, _LATEST))
    else:
      self._wait_for_news(started, _PATIENCE)
    for index in killed or range(number):
      started[index].kill(signal.SIGKILL if killed else signal.SIGTERM)
    ended = [one.end(_PATIENCE) for one in started]
    restored = self._restored()[resumes:]
    kind = f"{number} processes, {'killed' if killed else 'stopped'}"
    for index, one in enumerate(ended):
      name = f"killed {killed}, saved {saved}, restored {restored}"
      outcome = _outcome(one, index in killed, bool(killed))
      if _lost(saved, restored, bool(killed)):
        outcome = attacks.SILENT
      self.tally.add(kind, name, one, outcome)

  @pytest.mark.slow
  @pytest.mark.timeout(3600)
  def test_30_kills_of_2_to_4_processes(self):
    for kill in range(_KILLS):
      number = 2 + kill % 3
      killed = [int(self.random.integers(number))]
      if kill % 5 == 0:
        killed = [*range(number)]
      self._try(number, killed)
      if kill % 3 == 2:
        self._try(1 + kill // 3 % 4, [])
    wrong = attacks.report(self.tally, "Kills")
    self.assertEmpty(wrong, wrong)
    self.assertGreater(len(self._restored()), _KILLS // 2)


def _lost(saved, restored, has_victims):
  """Whether a run began before the last step that was saved.

  One that was killed may not have come to its beginning.
  """
  if saved is None or (has_victims and not restored):
    return False
  return not restored or restored[-1] < saved


def _outcome(ended, is_killed, has_victims):
  """What a process of a run should come to."""
  if ended.is_late:
    return attacks.HANG
  if "Traceback" in ended.err:
    return attacks.TRACEBACK
  if "DAMAGED" in ended.err:
    return attacks.SILENT
  if is_killed or ended.status == (_LOST if has_victims else 143):
    return attacks.RIGHT
  # A peer that was killed early never came.
  return ended.outcome if has_victims else attacks.SILENT


if __name__ == "__main__":
  absltest.main()
