from absl.testing import absltest
import numpy as np
import pytest

from kernels_pallas.aot import chips
from kernels_pallas.aot import topology
from launch.bench.ops import prefill_tpu


class SelectionTest(absltest.TestCase):

  def test_reads_the_first_block_its_own_and_as_many_as_are_asked(self):
    found = prefill_tpu.selection(8 * 128, 128, 3)
    table, num_valid = np.asarray(found.block_table), np.asarray(
        found.num_valid
    )
    self.assertEqual(num_valid[0, 0].tolist(), [1, 2, 3, 3, 3, 3, 3, 3])
    for own, (row, count) in enumerate(
        zip(table[0, 0], num_valid[0, 0], strict=True)
    ):
      read = row[:count].tolist()
      self.assertLen(set(read), count)
      self.assertContainsSubset({0, own}, read)
      self.assertLessEqual(max(read), own)

  def test_a_tenth_of_the_causal_blocks_is_read(self):
    for block, _ in prefill_tpu.CHOICES:
      count = 32_768 // block
      num = prefill_tpu.num_searched(32_768, block) + 2
      read = np.minimum(np.arange(count) + 1, num).sum()
      self.assertBetween(read / (count * (count + 1) / 2), 0.09, 0.1)


@absltest.skipUnless(topology.has_toolchain("tpu"), "libtpu is not installed")
class MeasureTest(absltest.TestCase):

  @pytest.mark.slow
  def test_the_choice_counts(self):
    """A promise of the docs: six times fewer, the choice included."""
    (row,) = prefill_tpu.measure(chips.get_chip("v5e"), 32_768, [(512, 8)])
    self.assertGreater(row["choice"], 0)
    self.assertGreater(row["ratio"], 6)
    self.assertGreater(row["alone"], row["ratio"])


if __name__ == "__main__":
  absltest.main()
