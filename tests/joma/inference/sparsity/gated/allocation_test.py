"""Tests of shares of a budget, beside all choices that there are."""

import itertools

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from joma.inference.sparsity.gated import allocation


class AllocationTest(parameterized.TestCase):

  @parameterized.parameters(*range(6))
  def test_no_choice_that_reads_as_little_costs_less(self, seed):
    rng = np.random.default_rng(seed)
    reads, costs = rng.uniform(size=(2, 3, 4))
    for budget in (0.0, 0.8, 1.5, 2.2, 3.0):
      chosen = allocation.allocate(reads, costs, budget)
      total = lambda x, option: sum(x[i, o] for i, o in enumerate(option))
      read, cost = total(reads, chosen), total(costs, chosen)
      least = reads.min(axis=1).sum()
      self.assertLessEqual(read, max(budget, least) + 1e-12)
      for other in itertools.product(range(4), repeat=3):
        if total(reads, other) <= read + 1e-12:
          self.assertGreaterEqual(total(costs, other), cost - 1e-12)

  def test_the_steep_layer_gets_what_the_flat_one_leaves(self):
    reads = np.array([[1.0, 2, 3], [1, 2, 3]])
    costs = np.array([[9.0, 3, 0], [1, 0.5, 0]])
    chosen = allocation.allocate(reads, costs, 4)
    np.testing.assert_array_equal(chosen, [2, 0])
    chosen = allocation.allocate(reads, costs, 6)
    np.testing.assert_array_equal(chosen, [2, 2])

  def test_an_option_that_reads_more_for_nothing_is_never_chosen(self):
    reads = np.array([[1.0, 1, 2]])
    costs = np.array([[5.0, 4, 4]])
    np.testing.assert_array_equal(allocation.allocate(reads, costs, 9), [1])


if __name__ == "__main__":
  absltest.main()
