import math

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from scansnap_jax.experiment import intervals


class LargestRiseTest(parameterized.TestCase):

  @parameterized.parameters(
      # Falls for good; rises for good.
      ([3.0, 2.0, 1.0], 0.0, 0.0, 0),
      ([1.0, 2.0, 3.0], 0.0, 2.0, 0),
      # Down 2, up 1, down again.
      ([3.0, 1.0, 2.0, 0.5], 2.0, 1.0, 1),
      # The second rise is the larger one; from the least value so far.
      ([3.0, 2.0, 2.5, 1.0, 2.0], 2.0, 1.0, 3),
      # A rise that stays above an earlier least value is measured from there.
      ([3.0, 1.0, 1.5, 1.2, 1.6], 2.0, 0.6, 1),
      # What comes after a value that is no number does not count.
      ([3.0, 2.0, float("nan"), 9.0], 0.0, 0.0, 0),
  )
  def test_of_a_curve(self, curve, fall, rise, lowest):
    found = intervals.largest_rise(np.array(curve))
    np.testing.assert_allclose(found[:2], (fall, rise), atol=1e-12)
    self.assertEqual(found.lowest, lowest)


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


class EmitTest(absltest.TestCase):

  def test_streams_means_over_runs(self):
    rows = []
    curves = {"a": np.array([[1.0, 2.0], [3.0, 6.0]])}
    intervals.emit(lambda *row: rows.append(row), np.array([0, 10]), curves)
    self.assertEqual(rows, [(0, {"a": 2.0}), (10, {"a": 4.0})])
    intervals.emit(None, np.array([0]), {"a": np.array([[math.nan]])})


if __name__ == "__main__":
  absltest.main()
