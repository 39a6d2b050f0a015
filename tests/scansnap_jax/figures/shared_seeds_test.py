from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from scansnap_jax.experiment import intervals
from scansnap_jax.figures import shared_seeds
from tests.scansnap_jax.figures import made_up

_SEEDS = (4, 9, 2, 6)
# Contrasts of four seeds, orthogonal and of mean 0.
_ONE = np.array([1, -1, 1, -1]) / 8
_TWO = np.array([1, 1, -1, -1]) / 8


def _result(ratio_1, ratio_2, lr_z=(0.5,)):
  """Entropies after training at two ratios; seeds in the order of _SEEDS."""
  result = made_up.result(lr_z=lr_z, lr_ratio=(1.0, 2.0), seeds=_SEEDS)
  for ratio, values in ((1.0, ratio_1), (2.0, ratio_2)):
    for seed, value in zip(_SEEDS, values, strict=True):
      own = (result.runs.seed == seed) & (result.runs.lr_ratio == ratio)
      result.history.distinct_entropy[own, -1] = value
  return result


class SummarizeTest(parameterized.TestCase):

  @parameterized.parameters(
      (_ONE, _ONE, 1.0, 1.0),
      (_ONE, _TWO, 0.0, 2.0),
      (_ONE, -_ONE, -1.0, 1.0),
      # Correlation 1/sqrt(2): 4 / (2 + 2/2).
      (_ONE, _ONE + _TWO, 0.5**0.5, 4 / 3),
  )
  def test_seeds_that_move_points_together_leave_fewer(
      self, one, two, correlation, effective
  ):
    found = shared_seeds.summarize(_result(2 + one, 2 + two))
    self.assertEqual((found["num_cells"], found["num_seeds"]), (2, 4))
    self.assertAlmostEqual(found["mean_correlation"], correlation, places=6)
    self.assertAlmostEqual(found["effective_cells"], effective, places=6)

  def test_the_lowest_ratio_is_held_against_the_next_seed_by_seed(self):
    differences = np.array([0.25, 0.375, 0.125, 0.25])
    # Seeds lie far apart, which the pairs do not feel.
    two = 1.5 + 4 * _TWO
    (row,) = shared_seeds.summarize(_result(two + differences, two))["lowest"]
    self.assertEqual((row["lr_z"], row["lr_ratio"]), (0.5, 2.0))
    self.assertEqual(row["next"]["lr_ratio"], 1.0)
    # Student's t of three degrees of freedom, .975: 3.182.
    half = 3.182 * differences.std(ddof=1) / 2
    self.assertAlmostEqual(row["next"]["mean"], 0.25)
    self.assertAlmostEqual(row["next"]["low"], 0.25 - half, places=4)
    self.assertAlmostEqual(row["next"]["high"], 0.25 + half, places=4)
    self.assertEqual(intervals.interval(differences)["low"], row["next"]["low"])

  def test_every_eta_z_has_its_own(self):
    result = _result(2 + _ONE, 2 + _TWO, lr_z=(0.5, 3.0))
    found = shared_seeds.summarize(result)
    self.assertEqual([row["lr_z"] for row in found["lowest"]], [0.5, 3.0])

  def test_nothing_of_two_seeds_one_point_or_values_that_do_not_vary(self):
    self.assertIsNone(shared_seeds.summarize(made_up.result(seeds=(1, 2))))
    self.assertIsNone(shared_seeds.summarize(made_up.result(seeds=(1, 2, 3))))
    self.assertIsNone(
        shared_seeds.summarize(_result(2 + _ONE, 2 + np.zeros(4)))
    )


if __name__ == "__main__":
  absltest.main()
