from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import masks
from kernels_pallas import selection as selection_lib
from kernels_pallas.attention import api
from kernels_pallas.attention.xla import together
from tests import draws

# Four blocks of two queries; of three tiles the first reads 2, the second 0 and
# 1, the third none, the last 2 and 0. What is behind the lists does not count.
_TABLE = np.array([[2, 0], [0, 1], [9, 9], [2, 0]], np.int32)[None, None]
_NUM_VALID = np.array([1, 2, 0, 2], np.int32)[None, None]


def _selection(block_q=2, as_array=np.asarray):
  return selection_lib.Selection(
      as_array(_TABLE), as_array(_NUM_VALID), None, block_q, 4
  )


class ListsTest(parameterized.TestCase):

  @parameterized.parameters(np.asarray, jnp.asarray)
  def test_a_strip_reads_what_any_of_its_blocks_reads(self, as_array):
    own = together.own_tiles(_selection(as_array=as_array), 3, 3)
    want = [
        [[0, 0, 1], [1, 1, 0], [0, 0, 0]],
        [[1, 0, 1], [0, 0, 0], [0, 0, 0]],
    ]
    np.testing.assert_array_equal(own[0, 0], want)
    table, num_valid = together.lists(own)
    np.testing.assert_array_equal(num_valid[0, 0], [3, 2])
    self.assertEqual(table[0, 0, 0].tolist(), [0, 1, 2])
    self.assertEqual(table[0, 0, 1, :2].tolist(), [0, 2])

  def test_queries_of_a_block_read_the_tiles_of_their_own(self):
    own = jnp.array([[1, 0, 1], [0, 0, 1]])
    found = together.allowed(own, jnp.array([2, 0]), 2, 3)
    rows = [[1, 1, 1, 1, 1, 1]] * 2 + [[1, 1, 1, 0, 0, 0]] * 2
    np.testing.assert_array_equal(found, rows)

  @parameterized.parameters(
      # 12 rows over groups of 2 and blocks of 2 are three blocks.
      (3, 2, 12, 3),
      (3, 2, 3, 1),  # A block has the rows already.
      (3, 2, 1000, 4),  # There are no more.
      (16, 2, 12, 3),
      (17, 2, 12, 1),  # More than eight times what a block lists.
  )
  def test_as_many_blocks_as_pay(self, num_tiles, group, num_rows, want):
    found = together.num_blocks(_selection(), num_tiles, group, num_rows)
    self.assertEqual(found, want)


class SelectedTest(parameterized.TestCase):

  def test_single_queries_equal_the_reference(self):
    """150 queries of one block each, in strips of 128; a list a key head."""
    length, num_tiles = 150, 10
    query = draws.normal(0, 1, length, 4, 8)
    key, value = draws.normal(1, 2, 1, length, 2, 8)
    rng = np.random.default_rng(2)
    table = rng.permuted(
        np.tile(np.arange(num_tiles), (1, 2, length, 1)), axis=-1
    )
    num_valid = rng.integers(0, 4, (1, 2, length))
    mask = masks.causal(length)

    def run(implementation):
      @jax.jit
      def outputs(query, key, value, table, num_valid):
        chosen = selection_lib.Selection(table, num_valid, mask, 1, 16)
        call = lambda *arrays: api.attention(
            *arrays,
            where=chosen,
            return_lse=True,
            return_col_mass=True,
            implementation=implementation,
        )

        def square(*arrays):
          found = call(*arrays)
          return jnp.square(found.out).sum(), found

        run = jax.value_and_grad(square, argnums=(0, 1, 2), has_aux=True)
        return run(query, key, value)

      chosen = jnp.asarray(table[..., :3], jnp.int32), jnp.asarray(num_valid)
      return outputs(query, key, value, *chosen)

    got, want = run("xla"), run("reference")
    chex.assert_trees_all_close(got, want, atol=2e-5)
    self.assertTrue(np.isneginf(want[0][1].lse).any())


if __name__ == "__main__":
  absltest.main()
