from absl.testing import absltest
import pytest

from kernels_pallas.aot import chips
from kernels_pallas.aot import topology
from kernels_pallas.gather_mlp import shapes
from launch.bench.ops import mlp_tpu


class SummaryTest(absltest.TestCase):

  def test_densities_at_which_a_line_meets_the_dense_times(self):
    base = {"shape": "x"}
    rows = [
        base | {"time_us": 200.0, "hbm_us": 100.0},
        base | {"density": 0.1, "time_us": 12.0},
        base | {"density": 0.3, "time_us": 52.0},
    ]
    # 200 us more a unit of density: 100 at 0.54, 200 beyond 1.
    (sentence,) = mlp_tpu.summary(rows)
    self.assertIn("below a density of 100%, than", sentence)
    self.assertIn("peak of the memory below 54%", sentence)
    self.assertEndsWith(sentence, "at 10% 16.7x and 8.3x")


@absltest.skipUnless(topology.has_toolchain("tpu"), "libtpu is not installed")
class MeasureTest(absltest.TestCase):

  @pytest.mark.slow
  def test_copies_of_the_compiled_kernel_are_the_chosen_blocks(self):
    name = "llama3_8b_b16"
    rows = mlp_tpu.measure(chips.get_chip("v6e"), [name], 1)
    dense, *gathered = rows
    self.assertGreater(dense["time_us"], 0)
    shape = shapes.BENCHMARKS[name]
    for row in gathered:
      self.assertEqual(row["copies"], row["density"] * shape.num_blocks)
      self.assertAlmostEqual(row["byte_share"], row["density"], delta=1e-3)
      self.assertEqual(row["temp_bytes"], 0)
      # As many cycles as its bytes need, or fewer.
      self.assertLess(row["static_us"], row["hbm_us"])


if __name__ == "__main__":
  absltest.main()
