"""Lists of tiles that are made from data, beside those of NumPy."""

from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import masks
from kernels_pallas import selection as selection_lib
from kernels_pallas.aot import compile as compile_lib
from kernels_pallas.aot import hlo
from kernels_pallas.aot import topology
from kernels_pallas.attention import api
from kernels_pallas.attention.tpu import layout
from kernels_pallas.attention.tpu import lists

_BLOCK = 128


def _table(num_tiles, width):
  """A table of two heads, with an entry out of range and one twice."""
  rng = np.random.default_rng(0)
  rows = [rng.permutation(num_tiles)[:width] for _ in range(2 * num_tiles)]
  table = np.stack(rows).reshape(1, 2, num_tiles, width).astype(np.int32)
  num_valid = rng.integers(0, width + 1, table.shape[:3]).astype(np.int32)
  table[0, 0, 1, 0], num_valid[0, 0, 1] = num_tiles + 3, 2
  table[0, 1, 2, 1], num_valid[0, 1, 2] = table[0, 1, 2, 0], width
  return table, num_valid


class ListsTest(parameterized.TestCase):

  @parameterized.product(wide=(3, 64), mask=("none", "causal", "sinks"))
  @pytest.mark.by_default(0, 2, 4, 5)
  def test_of_a_table_from_data_are_those_of_a_known_one(self, wide, mask):
    self.enter_context(mock.patch.object(lists, "_WIDE", wide))
    num_tiles, width = 7, 5
    length = num_tiles * _BLOCK - 9
    where = {
        "none": None,
        "causal": masks.causal(length),
        "sinks": masks.streaming(length, window=300, num_sinks=10),
    }[mask]
    table = _table(num_tiles, width)
    sizes = layout.Sizes(1, 2, 2, length, length, 64, 2)
    tiles = layout.Tiles(_BLOCK, _BLOCK)

    def both(*table):
      chosen = selection_lib.Selection(*table, where, _BLOCK, _BLOCK)
      return [f(chosen, sizes, tiles) for f in (lists.by_query, lists.by_key)]

    found = jax.tree.map(np.asarray, jax.jit(both)(*table))
    for one, two in zip(both(*table), found, strict=True):
      np.testing.assert_array_equal(two.num_full, one.num_full)
      np.testing.assert_array_equal(two.num_valid, one.num_valid)
      for at in np.ndindex(one.num_valid.shape):
        full, valid = one.num_full[at], one.num_valid[at]
        for part in (slice(full), slice(full, valid)):
          row = np.sort(two.table[at][part])
          np.testing.assert_array_equal(row, one.table[at][part])
        # What is past the end repeats the last tile.
        last = two.table[at][valid - 1] if valid else 0
        self.assertTrue((two.table[at][valid:] == last).all())


@absltest.skipUnless(topology.has_toolchain("tpu"), "libtpu is not installed")
class CompileTest(absltest.TestCase):

  @pytest.mark.slow
  def test_planning_is_a_small_part_of_what_the_kernel_takes(self):
    length, block = 32_768, 512
    table = jax.ShapeDtypeStruct((1, 1, 64, 7), jnp.int32)
    num_valid = jax.ShapeDtypeStruct((1, 1, 64), jnp.int32)
    array = jax.ShapeDtypeStruct((1, length, 1, 128), jnp.bfloat16)

    def attend(query, key, value, *table):
      mask = masks.causal(length)
      where = selection_lib.Selection(*table, mask, block, block)
      return api.attention(
          query, key, value, where=where, implementation="pallas_tpu"
      ).out

    compiled = compile_lib.compile_for(
        "v5e", attend, array, array, array, table, num_valid
    )
    self.assertNotIn(" sort(", compiled.hlo)
    self.assertNotIn(" gather(", compiled.hlo)
    # The kernel takes 313,962 bundles at a density of 10 %.
    self.assertLess(hlo.fusion_cycles(compiled.hlo), 0.1 * 313_962)


if __name__ == "__main__":
  absltest.main()
