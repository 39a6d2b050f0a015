from absl.testing import absltest
import numpy as np

from joma.systems.probes import update_rank


class UpdateRankTest(absltest.TestCase):

  def test_is_the_number_of_values_that_hold_nine_tenths(self):
    start = np.random.default_rng(0).normal(size=(5, 4))
    for values, want in (
        ((3.0, 0.9, 0, 0), 1),
        ((3.0, 1.1, 0, 0), 2),
        ((1.0, 1.0, 1.0, 1.0), 4),
        ((0.0, 0, 0, 0), 0),
    ):
      change = np.zeros((5, 4))
      change[np.arange(4), np.arange(4)] = values
      with self.subTest(values):
        self.assertEqual(update_rank.update_rank(start + change, start), want)

  def test_a_change_that_is_not_finite_has_none(self):
    for worst in (np.nan, np.inf):
      change = np.ones((3, 2))
      change[1, 1] = worst
      self.assertTrue(
          np.isnan(update_rank.update_rank(change, np.ones((3, 2))))
      )


if __name__ == "__main__":
  absltest.main()
