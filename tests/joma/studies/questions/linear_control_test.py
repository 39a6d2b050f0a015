import dataclasses

from absl.testing import absltest
import pytest

from joma.studies.questions import linear_control

_CONFIG = linear_control.LinearControlConfig(
    num_seeds=2,
    num_classes=2,
    num_distinct=4,
    hidden_dim=8,
    num_samples=128,
    noises=(0.01, 0.2),
    step_size=1.0,
    stationary_step_size=0.2,
    num_steps=400,
    num_records=20,
)


class MeasureTest(absltest.TestCase):

  @pytest.mark.slow
  def test_linear_bounces_only_if_its_gradient_fades_and_classes_overlap(self):
    summary = linear_control.measure(_CONFIG)
    fading = summary["rows"]["cross-entropy"]["identity"]
    for row in summary["rows"]["stationary"]["identity"].values():
      self.assertEqual(row["num_bounces"], 0)
      # It has grown sparse all the same.
      self.assertLess(row["entropy"]["mean"][-1], 1.9)
    self.assertEqual(fading["0.01"]["num_bounces"], 0)
    self.assertEqual(fading["0.2"]["num_bounces"], 2)
    self.assertIn("A linear MLP bounces as well", summary["finding"])
    self.assertIn("0 of 4 linear runs bounce", summary["finding"])
    strict = dataclasses.replace(_CONFIG, min_rise=9.0)
    self.assertIn("not bounce more", linear_control.measure(strict)["finding"])


if __name__ == "__main__":
  absltest.main()
