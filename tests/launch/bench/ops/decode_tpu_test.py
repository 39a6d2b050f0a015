from absl.testing import absltest
import pytest

from kernels_pallas.aot import chips
from kernels_pallas.aot import topology
from launch.bench.ops import decode_tpu


class SummaryTest(absltest.TestCase):

  def test_names_the_worst_size(self):
    rows = [
        {"kernel": "decode", "slots": 512, "batch": 1, "of_roofline": 1.0},
        {"kernel": "decode", "slots": 4096, "batch": 8, "of_roofline": 1.125},
        {"kernel": "decode", "slots": 16, "batch": 1, "note": "too small"},
    ]
    self.assertEqual(
        decode_tpu.summary(rows),
        [
            "decode: at most 1.12 of the roofline, with 4,096 slots of 8"
            " sequences"
        ],
    )


@absltest.skipUnless(topology.has_toolchain("tpu"), "libtpu is not installed")
class MeasureTest(absltest.TestCase):

  @pytest.mark.slow
  def test_steps_take_the_time_of_their_bytes(self):
    rows = decode_tpu.measure(chips.get_chip("v5e"), (2,), (1024,), 1)
    decode, int8, pages, paged = rows
    self.assertEqual(paged["kernel"], "jax paged")
    for row in (decode, int8, pages):
      self.assertEqual(row["temp_bytes"], 0)
      self.assertLessEqual(row["of_roofline"], 1.5 if row is pages else 1.2)
    # A head less than half the bytes: int8 has scales.
    self.assertBetween(int8["hbm_mb"] / decode["hbm_mb"], 0.5, 0.56)
    self.assertNotIn("", [row["static_bundles"] for row in rows])


if __name__ == "__main__":
  absltest.main()
