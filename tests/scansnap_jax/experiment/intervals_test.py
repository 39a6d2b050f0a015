from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from scansnap_jax.experiment import intervals


class IntervalTest(parameterized.TestCase):

  # Published tables of Student's t, two-sided 95 %.
  @parameterized.parameters(
      (1, 12.7062), (4, 2.7764), (9, 2.2622), (30, 2.0423)
  )
  def test_quantile_of_students_t(self, degrees, expected):
    self.assertAlmostEqual(intervals.t_quantile(degrees), expected, places=3)

  def test_is_t_times_the_standard_error(self):
    # Deviation 1, two runs: error 1 / sqrt 2 times sqrt 2 sample deviation.
    parts = intervals.interval(np.array([1.0, 3.0]))
    self.assertAlmostEqual(parts["mean"], 2)
    self.assertAlmostEqual(parts["high"] - 2, 12.7062, places=3)
    self.assertAlmostEqual(2 - parts["low"], 12.7062, places=3)

  def test_covers_the_mean_as_often_as_it_says(self):
    draws = np.random.default_rng(0).normal(1.0, 2.0, (5, 4000))
    parts = intervals.interval(draws)
    covers = (parts["low"] < 1) & (1 < parts["high"])
    # Three standard errors of 4000 draws.
    self.assertAlmostEqual(covers.mean(), 0.95, delta=0.0104)

  def test_ends_at_the_range(self):
    parts = intervals.interval(np.array([0.1, 0.9]), least=0, most=1)
    self.assertEqual((parts["low"], parts["high"]), (0, 1))

  def test_of_positive_values_is_geometric(self):
    rows = np.array([[0.0, 1.0, 2.0], [0.0, 100.0, 2.0]])
    parts = intervals.interval(rows, is_positive=True)
    np.testing.assert_allclose(parts["mean"], [0, 10, 2], rtol=1e-6)
    np.testing.assert_allclose(parts["low"][[0, 2]], [0, 2], rtol=1e-6)
    self.assertBetween(parts["low"][1], 0, 10)
    np.testing.assert_allclose(
        parts["low"][1] * parts["high"][1], 100, rtol=1e-6
    )

  def test_text(self):
    parts = dict(mean=1.0, low=0.5, high=1.25)
    self.assertEqual(intervals.text(parts, 2), "1.00 [0.50, 1.25]")


class RankTest(absltest.TestCase):

  def test_intervals_that_share_a_value_overlap(self):
    of = lambda low, high: {"low": float(low), "high": float(high)}
    self.assertTrue(intervals.overlap(of(0, 1), of(1, 2)))
    self.assertTrue(intervals.overlap(of(0, 3), of(1, 2)))
    self.assertFalse(intervals.overlap(of(0, 1), of(1.1, 2)))
    self.assertFalse(intervals.overlap(of(1.1, 2), of(0, 1)))

  def test_best_is_what_is_apart_from_all(self):
    self.assertEqual(intervals.rank("3", []), "is best with 3")
    self.assertEqual(
        intervals.rank("3", ["A", "B"]),
        "has 3, and is not apart from A, B (95 % intervals overlap)",
    )


if __name__ == "__main__":
  absltest.main()
