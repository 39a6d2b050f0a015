from absl.testing import parameterized
import pytest

from kernels_pallas.attention import shapes
from launch.bench.ops import gpu
from launch.bench.ops import gpu_rows
from launch.bench.ops import memory_gpu


class BenchKernelsGpuTest(parameterized.TestCase):

  @pytest.mark.slow
  def test_a_peer_that_cannot_run_costs_its_rows_alone(self):
    self._check("jax_xla")

  @pytest.mark.slow
  def test_block_sparse_attention_is_measured_too(self):
    rows = self._check("xla")
    assert "block-sparse gradients" in {row["what"] for row in rows}

  def _check(self, peer):
    measured = gpu.measure(
        peers=("cudnn", peer),
        ops=("attention",),
        op_sizes=memory_gpu.Sizes(lengths=()),
        cases=[shapes.square(64, 2, 1, 64)],
        sparse_length=64,
        matmul_size=16,
        copy_bytes=64,
        error_length=40,
        num_times=2,
        calls_per_sync=4,
        rotated_bytes=1,
    )
    rows = list(measured)
    ceilings = [row for row in rows if row["what"] == "ceiling"]
    assert len(ceilings) == 2
    assert ceilings[1]["of_copy"] == 1
    for row in ceilings + [row for row in rows if row["peer"] == peer]:
      if row["what"].startswith("error"):
        assert 1e-4 < row["error"] < 1e-2, row
      else:
        assert row["median_ms"] > 0 and row["note"] == "", row
    failed = [row for row in rows if row["peer"] == "cudnn"]
    # Forward and gradients: errors for two head sizes, and one shape timed.
    assert len(failed) == 6
    assert all(row["note"] and "median_ms" not in row for row in failed)
    lines = gpu_rows.table(rows).splitlines()
    assert len(lines) == len(rows) + 2
    assert {line.count("|") for line in lines} == {12}
    return rows

  def test_without_a_gpu_nothing_is_called_its_figures(self):
    with self.assertRaisesRegex(ValueError, "--target=gpu .* has cpu devices"):
      gpu.report()

  def test_rows_after_the_deadline_are_named(self):
    rows = list(gpu.measure(max_seconds=-1.0, sparse_length=256))
    assert all(row["note"] == "not measured: no time left" for row in rows)
    lengths = {
        row["case"].split()[1] for row in rows if row["what"] == "forward"
    }
    assert {"T=1024", "T=65536"} <= lengths
