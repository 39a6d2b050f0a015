import copy

from absl.testing import absltest
import numpy as np
import pytest

from joma.studies.questions import two_layer_hblt


class MeasureTest(absltest.TestCase):

  @pytest.mark.slow
  def test_training_gains_over_every_floor(self):
    config = two_layer_hblt.TwoLayerHbltConfig(
        num_seeds=2,
        num_classes=4,
        num_roots=4,
        branching=(2, 4),
        hidden_dim=8,
        batch_size=64,
        num_held_out=512,
        step_size=0.02,
        num_steps=300,
        num_records=2,
        num_scores=2,
    )
    summary = two_layer_hblt.measure(config)
    learned, frozen, shuffled = (
        summary["cases"][case] for case in two_layer_hblt.CASES
    )
    self.assertEqual(learned["scores"]["mean"].shape, (3, 2, 2))
    np.testing.assert_array_equal(summary["score_steps"], [0, 150, 300])
    for case in (learned, frozen):
      self.assertGreater(case["accuracy"]["mean"][-1], 0.6)
      self.assertGreater(case["gain"]["mean"][1].min(), 0.1)
    # Four classes, no information.
    self.assertLess(shuffled["accuracy"]["mean"][-1], 0.45)
    self.assertLess(shuffled["gain"]["mean"][1].max(), 0.1)
    # Best of 8 unrelated nodes over 512 samples: about 1.4 / sqrt(512).
    self.assertLess(learned["chance"]["mean"].max(), 0.15)
    np.testing.assert_allclose(frozen["strong_share"]["mean"], 0.5, rtol=1e-5)
    self.assertGreater(learned["strong_share"]["mean"][-1], 0.6)
    cases = copy.deepcopy(summary["cases"])
    cases["learned"]["gain"]["low"] += 1
    cases["learned"]["sorting"] = dict(mean=0.3, low=0.2, high=0.4)
    self.assertIn("Layers sort themselves", two_layer_hblt._finding(cases))
    cases["learned"]["sorting"]["low"] = -0.1
    self.assertIn("do not sort", two_layer_hblt._finding(cases))
    cases["learned"]["gain"]["low"] -= 9
    self.assertIn("does not bring", two_layer_hblt._finding(cases))


if __name__ == "__main__":
  absltest.main()
