from absl.testing import absltest
import numpy as np
import pytest

from kernels_pallas.attention import shapes
from launch.bench.around import single_queries


class SingleQueriesTest(absltest.TestCase):

  def test_a_query_reads_its_own_block_and_others_before_it(self):
    shape = shapes.square(10, 2, 2, 8)
    found = single_queries.drawn(10, 2, 3, shape)
    self.assertEqual(found.block_table.shape, (1, 2, 10, 2))
    own = np.arange(10) // 3
    np.testing.assert_array_equal(found.block_table[0, 0, :, 0], own)
    np.testing.assert_array_equal(found.num_valid[0, 1], np.minimum(own + 1, 2))
    other = np.asarray(found.block_table[0, :, 3:, 1])
    self.assertTrue((other < own[3:]).all() and (other >= 0).all())

  @pytest.mark.slow
  def test_times_both_ways_in_turns(self):
    (row,) = single_queries.report([(64, 2, 8)], num_rounds=2)
    self.assertEqual((row["length"], row["blocks"]), (64, "2 x 8"))
    self.assertGreater(min(row["each_s"], row["together_s"]), 0)


if __name__ == "__main__":
  absltest.main()
