from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from kernels_pallas import masks
from kernels_pallas import selection as selection_lib
from launch.bench.ops import programs


class RandomSelectionTest(parameterized.TestCase):

  @parameterized.parameters((64, 64), (64, 128), (128, 64))
  def test_has_the_density_and_what_its_queries_cannot_do_without(
      self, block_q, block_kv
  ):
    found = programs.random_selection(2048, 3, block_q, block_kv, 0.1)
    states = selection_lib.tile_states(
        masks.causal(2048), 2048, 2048, block_q, block_kv
    )
    listed = np.zeros((3, *states.shape), int)
    for head, row in np.ndindex(*found.num_valid.shape[1:]):
      num = found.num_valid[0, head, row]
      np.add.at(listed[head, row], found.block_table[0, head, row, :num], 1)
    self.assertLessEqual(listed.max(), 1)
    self.assertFalse(listed[:, states == selection_lib.EMPTY].any())
    self.assertTrue(listed[:, states == selection_lib.PARTIAL].all())
    num_causal = (states > selection_lib.EMPTY).sum()
    share = listed.sum() / (3 * num_causal)
    # The share of a row is rounded up, to a block or to those on the diagonal.
    self.assertBetween(share, 0.1, 0.1 + len(states) / num_causal)
    self.assertFalse(
        (listed[0] == listed[1]).all(), "heads draw for themselves"
    )


if __name__ == "__main__":
  absltest.main()
