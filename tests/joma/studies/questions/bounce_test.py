import dataclasses

from absl.testing import absltest
import numpy as np
import pytest

from joma.studies.questions import bounce

_CONFIG = bounce.BounceConfig(
    num_seeds=2,
    num_classes=2,
    num_distinct=4,
    hidden_dim=8,
    num_samples=128,
    noise=0.2,
    step_size=0.5,
    num_steps=600,
    num_records=20,
    stationary_step_size=0.2,
)


class MeasureTest(absltest.TestCase):

  @pytest.mark.slow
  def test_no_bounce_as_long_as_the_gradient_is_stationary(self):
    rows = []
    summary = bounce.measure(_CONFIG, on_metrics=lambda *row: rows.append(row))
    self.assertEqual([*summary["panels"]], [*bounce.PANELS])
    self.assertLen(rows, 21)
    panels = summary["panels"]
    for panel, activations in panels.items():
      for row in activations.values():
        self.assertLen(row["entropy"]["mean"], 21)
        self.assertLess(row["entropy"]["mean"][0], np.log(8) + 1e-3)
        if panel != "stationary":  # Its steps are too large for the burst.
          # Theorem 1 says whether the steps were small enough.
          self.assertLess(row["law_error"], 0.1, panel)
    for row in panels["stationary"].values():
      self.assertEqual(row["num_bounces"], 0)
      self.assertLess(row["rise"]["mean"], 1e-4)
    bounces = sum(r["num_bounces"] for r in panels["isotropic, exp"].values())
    self.assertGreater(bounces, 3)
    self.assertIn("entropy bounces under exp", summary["finding"])
    self.assertIn(f"({bounces} of 6 runs", summary["finding"])
    # Had the entropy to rise by 9 nats, it would not.
    strict = bounce.measure(dataclasses.replace(_CONFIG, min_rise=9.0))
    self.assertIn("seldom bounces", strict["finding"])
    self.assertIn("(0 of 6 runs", strict["finding"])


if __name__ == "__main__":
  absltest.main()
