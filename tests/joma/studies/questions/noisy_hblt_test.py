from absl.testing import absltest
import pytest

from joma.studies.questions import noisy_hblt


class MeasureTest(absltest.TestCase):

  @pytest.mark.slow
  def test_noise_lowers_the_scores_and_their_floor(self):
    config = noisy_hblt.NoisyHbltConfig(
        num_seeds=2,
        num_classes=4,
        num_roots=4,
        branching=(2, 4),
        polarities=(0.5, 0.9),
        hidden_dim=8,
        batch_size=64,
        num_held_out=512,
        step_size=0.02,
        num_steps=150,
        num_records=1,
    )
    summary = noisy_hblt.measure(config)
    low, high = (summary["rows"][key] for key in ("0.5", "0.9"))
    for curve in ("trained", "untrained"):
      difference = high[curve]["mean"] - low[curve]["mean"]
      self.assertGreater(difference.min(), 0.1, curve)
    self.assertGreater(high["accuracy"]["mean"], low["accuracy"]["mean"] + 0.2)
    for row in (low, high):
      self.assertGreater(row["gain"]["mean"][1, 0], 0.05)
      self.assertGreater(row["gain_shuffled"]["mean"][1, 0], 0.05)
    for row in (low, high):
      row["gain"]["low"] -= 9
    self.assertIn("At no rho", noisy_hblt._finding(summary["rows"]))
    high["gain"]["low"] += 99
    self.assertIn("At rho 0.9 training", noisy_hblt._finding(summary["rows"]))


if __name__ == "__main__":
  absltest.main()
