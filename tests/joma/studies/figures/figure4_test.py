import dataclasses

from absl.testing import absltest
import numpy as np

from joma.studies.figures import figure4
from joma.theory import published


class MeasureTest(absltest.TestCase):

  def test_reproduces_the_published_trajectory(self):
    rows = []
    summary = figure4.measure(
        figure4.Figure4Config(), on_metrics=lambda *row: rows.append(row)
    )
    # Rounding to five digits, and float32.
    self.assertAlmostEqual(summary["min_entropy"], 0.94157, delta=1e-5)
    self.assertBetween(summary["min_step"], 668, 670)
    self.assertEqual(
        [*summary["entropy_at"]],
        ["0", "100", "300", "500", "1000", "2000", "4999"],
    )
    for step, expected in ((0, 2.3026), (100, 2.3015), (300, 2.2105)):
      entropy = summary["entropy_at"][str(step)]
      self.assertAlmostEqual(entropy, expected, delta=6e-5)
    self.assertIn("0.94157 at step 669 and rises again", summary["finding"])
    self.assertLen(rows, 500)
    self.assertEqual(rows[1][0], 10)

  def test_equals_a_loop_in_numpy(self):
    config = figure4.Figure4Config(num_steps=600)
    summary = figure4.measure(config)
    v = np.full(10, 0.05)
    for step in range(600):
      weights = np.exp(v**2 / 3) / np.exp(v**2 / 3).sum()
      if step in (0, 100, 300, 500):
        # Before the update of the step.
        entropy = -(weights * (np.log(weights) + 1e-8)).sum()
        # Ten times the largest float32 error seen.
        self.assertAlmostEqual(
            summary["entropy_at"][str(step)], entropy, delta=5e-6
        )
      v = v + 0.02 * (np.array(published.FIGURE4_MU) - v) * weights
    np.testing.assert_allclose(summary["v_final"], v, atol=5e-6)
    self.assertNotIn("1000", summary["entropy_at"])

  def test_one_target_for_all_has_no_minimum(self):
    config = figure4.Figure4Config(mu=(2.0, 2.0), num_steps=50)
    self.assertIn("without a minimum", figure4.measure(config)["finding"])
    moving = dataclasses.replace(config, mu=(2.0, 1.0), num_steps=20)
    self.assertIn("without a minimum", figure4.measure(moving)["finding"])


class PublishedTest(absltest.TestCase):

  def test_targets_are_float32_in_ascending_order(self):
    mu = np.array(published.FIGURE4_MU)
    np.testing.assert_array_equal(mu, np.float32(mu))
    np.testing.assert_array_equal(mu, np.sort(mu))
    # sort(3 rand(10) + 1): rand gives a multiple of 2^-24, and of every three
    # float32 numbers below 2 this reaches two alone.
    for target in np.float32(mu):
      near = np.round((target - 1) / 3 * 2**24) + np.arange(-2, 3)
      drawn = np.float32(near * 2.0**-24)
      self.assertIn(target, np.float32(3) * drawn + np.float32(1))


if __name__ == "__main__":
  absltest.main()
