from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np
import pytest

from kernels_pallas.aot import chips
from kernels_pallas.aot import topology
from launch.bench.around import planning_tpu
from launch.bench.ops import programs
from tests.kernels_pallas import modes


class ProgramTest(absltest.TestCase):

  @pytest.mark.slow
  def test_a_table_that_is_given_is_the_known_one(self):
    length, block, density = 1024, 128, 0.5
    run, (_, *arrays) = planning_tpu.from_data(length, block, density)
    known = programs.random_selection(length, 1, block, block, density)
    keys = jax.random.split(jax.random.key(0), 3)
    drawn = [
        jax.random.normal(key, x.shape, x.dtype)
        for key, x in zip(keys, arrays, strict=True)
    ]
    expected, _ = programs.sparse(length, block, block, density)
    with modes.mode_of("pallas_tpu"):
      found = jax.jit(run)((known.block_table, known.num_valid), *drawn)
      expected = jax.jit(expected)(*drawn)
    np.testing.assert_array_equal(found, expected)

  def test_the_table_is_an_argument(self):
    _, (table, *arrays) = planning_tpu.from_data(1024, 128, 0.5, 2, True)
    # Of 8 causal blocks of the last query block half.
    self.assertEqual([x.shape for x in table], [(1, 2, 8, 4), (1, 2, 8)])
    self.assertLen(arrays, 4)


@absltest.skipUnless(topology.has_toolchain("tpu"), "libtpu is not installed")
class MeasureTest(parameterized.TestCase):

  @parameterized.parameters("v5e", "v6e", "v5p")
  @pytest.mark.slow
  def test_planning_is_a_small_part_of_what_the_kernels_take(self, name):
    """A promise of the docs, for both sizes of blocks and both passes."""
    rows = planning_tpu.measure(chips.get_chip(name), 32_768)
    self.assertLen(rows, 4)
    for row in rows:
      self.assertBetween(row["share"], 0.01, 0.15, row)


if __name__ == "__main__":
  absltest.main()
