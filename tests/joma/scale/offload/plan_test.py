"""The plan of one chip and its host, and its report."""

import json
import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import pytest

from joma.scale.offload import offload_config
from joma.scale.offload import plan
from joma.scale.offload import report
from scansnap_jax.experiment import errors

_CONFIG = offload_config.OffloadConfig


class PlanTest(parameterized.TestCase):

  def test_more_of_the_host_is_never_worse(self):
    summary = plan.make(_CONFIG(shape="smollm2_1b7", seq_len=4096))
    rows = {row["way"]: row for row in summary["rows"]}
    speed = lambda way: rows[way]["tokens_per_sec"]
    for way in plan.WAYS:
      self.assertGreaterEqual(speed("anything"), speed(way))
      self.assertGreaterEqual(speed(way), speed("all on the chip"))
    self.assertEqual(rows["all on the chip"]["host_gb"], 0)
    self.assertEqual(rows["weights in the host"]["host_cache"], 0)
    self.assertIn("times what the chip alone", summary["finding"][1])

  def test_what_fits_nowhere_is_said(self):
    summary = plan.make(_CONFIG(shape="llama3_8b", host_gb=0.01))
    self.assertFalse(any(row["fits"] for row in summary["rows"]))
    self.assertIn("in no way", summary["finding"][0])
    self.assertLen(report.table(summary).rows, 4)

  @pytest.mark.slow
  def test_it_is_written_and_drawn(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    path = report.write(folder, plan.make(_CONFIG()), {})
    self.assertIn("tokens/s", path.read_text())
    self.assertTrue((folder / "offload.png").exists())
    saved = json.loads((folder / "summary.json").read_text())
    self.assertEqual(
        saved["rows"][0], {"way": "all on the chip", "fits": False}
    )

  @parameterized.parameters(
      (dict(chip="abacus"), "chip=abacus is none of"),
      (dict(host_gb=-1.0), "host_gb must be"),
      (dict(capacity=2000), "capacity must be from 1 to 1024"),
      (dict(page_size=0), "page_size must be at least 1"),
  )
  def test_settings_that_cannot_be_are_refused(self, changes, message):
    with self.assertRaisesRegex(errors.UserError, message):
      _CONFIG(**changes)


if __name__ == "__main__":
  absltest.main()
