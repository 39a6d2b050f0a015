from unittest import mock

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
    decode, int8, int4, pages, paged = rows
    self.assertEqual(paged["kernel"], "jax paged")
    for row in (decode, int8, int4, pages):
      self.assertEqual(row["temp_bytes"], 0)
      self.assertLessEqual(row["of_roofline"], 1.5 if row is pages else 1.2)
    # A head less than half the bytes: int8 has scales.
    self.assertBetween(int8["hbm_mb"] / decode["hbm_mb"], 0.5, 0.56)
    # Codes of four bits, and a sixteenth more; the newest 128 are as they came.
    self.assertBetween(int4["hbm_mb"] / decode["hbm_mb"], 0.3, 0.4)
    self.assertNotIn("", [row["static_bundles"] for row in rows])

  @pytest.mark.slow
  def test_four_bits_take_the_time_of_their_bytes_on_v5e_and_v6e(self):
    alone = {"decode int4": decode_tpu.KERNELS["decode int4"]}
    for chip, batch, slots in (
        ("v5e", 64, 16_384),
        ("v6e", 64, 16_384),
        ("v6e", 8, 512),
    ):
      with mock.patch.object(decode_tpu, "KERNELS", alone):
        (row,) = decode_tpu.measure(chips.get_chip(chip), (batch,), (slots,), 1)
      self.assertEqual(row["temp_bytes"], 0)
      self.assertLessEqual(row["of_roofline"], 1.3)


if __name__ == "__main__":
  absltest.main()
