import json
import os
import pathlib
import signal

from absl.testing import absltest

from joma.studies import parts
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import metric_stream
from scansnap_jax.experiment.processes import preemption


class PartsTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    self.workdir = pathlib.Path(self.create_tempdir().full_path)
    self.done = []

  def _measure(self, values=(1.5, 2.5), stop_after=None):
    def one(value):
      self.done.append(value)
      if value == stop_after:
        os.kill(os.getpid(), signal.SIGTERM)
      return {"value": value, "steps": [1, 2], "curves": {"loss": [value, 0.0]}}

    def measure(config, *, part):
      self.assertEqual(config, "settings")
      return {str(v): part(f"part {v}", lambda v=v: one(v)) for v in values}

    return parts.measure("study", measure, "settings", self.workdir)

  def test_a_stopped_run_goes_on_from_its_parts(self):
    with self.assertRaises(preemption.Stopped):
      self._measure(stop_after=1.5)
    found = self._measure()
    self.assertEqual(self.done, [1.5, 2.5])  # Each once.
    self.assertEqual(found, self._measure())
    self.assertEqual(found["2.5"]["curves"], {"loss": [2.5, 0.0]})
    rows = metric_stream.read_rows(self.workdir / "metrics.jsonl")
    self.assertLen(rows, 4)
    self.assertEqual(
        rows[0],
        {"step": 1, "experiment": "study", "part": "part 1.5", "loss": 1.5},
    )

  def test_a_damaged_part_is_measured_anew(self):
    whole = self._measure()
    for damage in (
        lambda text: text.replace("1.5", "1.6"),
        lambda text: text[:-9],
        lambda text: "{}",
    ):
      (path,) = (self.workdir / "parts").glob("part_1_5.*.json")
      path.write_text(damage(path.read_text()))
      self.done.clear()
      self.assertEqual(self._measure(), whole)
      self.assertEqual(self.done, [1.5])

  def test_what_is_not_finite_is_not_kept(self):
    with self.assertRaisesRegex(errors.UserError, "part inf, value is inf"):
      self._measure(values=(float("inf"),))
    self.assertEmpty([*(self.workdir / "parts").iterdir()])
    json.dumps(parts.at_once("name", lambda: {"value": 1.0}))


if __name__ == "__main__":
  absltest.main()
