import json
import pathlib
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import pytest

from joma.scale import plan
from joma.scale.curve import curve_config
from joma.scale.curve import report as curve_report
from joma.scale.curve import scaling
from scansnap_jax.experiment import errors


class ConfigTest(parameterized.TestCase):

  @parameterized.parameters(
      (dict(num_chips=()), "num_chips must name one"),
      (dict(num_chips=(8, 12)), "num_chips=12 must be a power of two"),
      (dict(compiled=(16,), num_chips=(8,)), "compiled=16 must be among"),
      (dict(chip="h100"), "chip=h100 is none of v4, v5e, v5p"),
      (dict(task="decode", policy="h2o"), "policy=h2o needs capacity"),
  )
  def test_what_is_no_curve_is_refused(self, changes, message):
    settings = {"compiled": (), **changes}
    with self.assertRaisesRegex(errors.UserError, message):
      curve_config.ScalingConfig(**settings)

  @parameterized.parameters(
      ("v5p", 8, "v5p:2x2x2"),
      ("v5p", 16, "v5p:2x2x4"),
      ("v5p", 4096, "v5p:16x16x16"),
      ("v5e", 8, "v5e:2x4"),
      ("v5e", 1, "v5e:1x1"),
  )
  def test_slices_are_as_near_to_cubes_as_can_be(self, chip, number, name):
    self.assertEqual(curve_config.topology(chip, number), name)


class ScalingTest(absltest.TestCase):

  def _make(self, **changes):
    return scaling.make(curve_config.ScalingConfig(compiled=(), **changes))

  @pytest.mark.slow
  def test_arithmetic_falls_as_chips_grow_and_the_knee_is_where_it_is_less(
      self,
  ):
    summary = self._make()
    rows = summary["rows"]
    self.assertEqual(rows[0]["efficiency"], 1)
    for row in rows:
      share = rows[0]["flops"] / row["flops"]
      self.assertAlmostEqual(share, row["num_chips"] / 8)
    turned = [row["bound"] == "ICI" for row in rows]
    self.assertEqual(turned, sorted(turned))
    self.assertIn(True, turned)
    knee = rows[turned.index(True)]["num_chips"]
    self.assertIn(f"The knee is at {knee} chips", summary["finding"][1])
    efficiency = [row["efficiency"] for row in rows]
    self.assertEqual(efficiency, sorted(efficiency, reverse=True))

  def test_rows_that_are_not_compiled_are_scaled_by_those_that_are(self):
    config = curve_config.ScalingConfig(num_chips=(8, 16, 32), compiled=(8, 32))
    plain = self._make(num_chips=(8, 16, 32))["rows"]

    def compiled(asked, model, guess):
      del model
      # Twice the FLOPs of the formula, on 32 chips thrice.
      factor = 3 if asked.num_devices == 32 else 2
      return {
          "flops": factor * guess.flops,
          "moved_bytes": guess.hbm_bytes,
          "collectives": [{"sent_bytes": 5 * sum(guess.ici_bytes.values())}],
          "seconds": {
              "compute": factor * guess.compute_seconds,
              "HBM": guess.hbm_seconds,
              "ICI": 5 * guess.ici_seconds,
          },
          "fits": True,
          "held_bytes": 1,
          "compile_seconds": 1.0,
      }

    with mock.patch.object(plan, "of_mesh", compiled):
      rows = scaling.make(config)["rows"]
    factors = [
        row["flops"] / alone["flops"]
        for row, alone in zip(rows, plain, strict=True)
    ]
    self.assertEqual(factors, [2, 2, 3])
    self.assertEqual([row["is_compiled"] for row in rows], [True, False, True])
    self.assertAlmostEqual(rows[1]["sent_bytes"] / plain[1]["sent_bytes"], 5)

  @pytest.mark.slow
  def test_it_is_written_and_drawn(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    summary = self._make(num_chips=(8, 64, 4096))
    path = curve_report.write(folder, summary, {})
    self.assertIn("4096", path.read_text())
    self.assertTrue((folder / "scaling.png").exists())
    saved = json.loads((folder / "summary.json").read_text())
    self.assertLen(saved["rows"], 3)
    self.assertLen(curve_report.table(summary).rows, 3)


if __name__ == "__main__":
  absltest.main()
