from absl.testing import absltest
import numpy as np
import pytest

from kernels_pallas.decode import shapes
from launch.bench.ops import decode_cpu


class DecodeRowTest(absltest.TestCase):

  @pytest.mark.slow
  def test_times_both_caches_in_turns(self):
    shape = shapes.Shape(num_heads=2, num_kv_heads=1, capacity=0, head_dim=8)
    row = decode_cpu.decode_row(16, 32, shape=shape, num_times=3)
    self.assertEqual((row["slots"], row["keys"], row["batch"]), (16, 32, 1))
    np.testing.assert_allclose(row["of_full"], row["full_ms"] / row["ours_ms"])
    np.testing.assert_allclose(row["of_peer"], row["peer_ms"] / row["ours_ms"])
    self.assertGreater(row["ours_ms"], 0)


if __name__ == "__main__":
  absltest.main()
