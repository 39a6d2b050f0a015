from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
import pytest

from kernels_pallas.attention.xla import schedule
from launch.bench.ops import cpu as bench


class BenchKernelsCpuTest(parameterized.TestCase):

  @pytest.mark.slow
  def test_rows_of_a_shape(self):
    rows = list(
        bench.dense_rows((32,), heads=((2, 1),), kinds=("full",), num_times=1)
    )
    self.assertEqual(
        [(row["what"], row["mask"]) for row in rows],
        [
            ("forward", "full"),
            ("forward + col_mass", "full"),
            ("forward + backward", "full"),
        ],
    )
    for row in rows:
      self.assertGreater(row["ours_ms"], 0)
      self.assertAlmostEqual(row["ratio"], row["ours_ms"] / row["peer_ms"])
      self.assertEqual(row["num_times"], 4)
      self.assertGreaterEqual(row["load_1min"], 0)
    # Both compute the same: float32 rounding apart.
    self.assertLess(max(row.get("difference", 0) for row in rows), 1e-5)

  def test_quartiles_and_ratios(self):
    times = {"ours": np.array([1.0, 2, 3, 4, 5]), "peer": np.arange(2.0, 12, 2)}
    row = bench._row(bench.shapes.square(8, 2, 1), True, "x", times)
    self.assertEqual((row["ours_ms"], row["ours_iqr_ms"]), (3000, 2000))
    self.assertEqual((row["ratio"], row["ratio_of_least"]), (0.5, 0.5))

  @pytest.mark.slow
  def test_a_fresh_process_tells_its_peak(self):
    (row,) = bench.memory_rows(64, ["forward + col_mass"])
    self.assertEqual(row["what"], "forward + col_mass, memory")
    self.assertGreater(row["peak_rss_gb"], 0.05)
    self.assertGreaterEqual(row["peak_rss_gb"], row["before_gb"])

  def test_compiled_programs_tell_their_arrays(self):
    rows = list(bench.compiled_rows((256,)))
    self.assertEqual([row["length"] for row in rows], [256, 256])
    self.assertGreater(min(row["temp_mb"] for row in rows), 0)

  @pytest.mark.slow
  def test_block_sparse(self):
    with mock.patch.object(schedule, "_NUM_TRACED_WIDTHS", 1):
      row = bench.sparse_row(64, block_q=16, block_kv=8, num_times=1)
    # The diagonal's block (of 16 keys half) and one heavy one a row.
    self.assertRegex(row["what"], r"block-sparse, \d\d% of the pairs")

  def test_linear_attention(self):
    row = bench.linear_row(64, num_times=1)
    self.assertEqual((row["what"][:6], row["length"]), ("linear", 64))
    self.assertGreater(row["ratio"], 0)

  def test_a_gathered_mlp(self):
    shape = bench.gather_shapes.Shape(
        batch=1, width=16, num_neurons=320, block_size=32, is_gated=True
    )
    with mock.patch.dict(bench.gather_shapes.BENCHMARKS, {"tiny": shape}):
      row = bench.mlp_row("tiny", num_times=1)
    self.assertEqual(row["what"], "gather MLP at 10%, by dense")
    self.assertEqual((row["shape"], row["num_times"]), ("tiny", 1))


if __name__ == "__main__":
  absltest.main()
