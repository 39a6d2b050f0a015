from absl.testing import absltest
from absl.testing import parameterized
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.aot import chips


class GetChipTest(parameterized.TestCase):

  @parameterized.parameters("7x", "v7x", "tpu7x")
  def test_spellings_of_v7x_are_one_chip(self, name):
    self.assertEqual(chips.get_chip(name), chips.get_chip("v7x"))

  def test_an_unknown_chip_is_named_with_the_known_ones(self):
    with self.assertRaisesRegex(ValueError, "'v8'.*v4, v5e, v5p, v6e, v7x, h1"):
      chips.get_chip("v8")

  @parameterized.parameters(*chips.TPU_NAMES)
  def test_clock_times_multipliers_is_the_peak(self, name):
    chip = chips.get_chip(name)
    lanes = 128 if name in ("v4", "v5e", "v5p") else 256
    peak = chip.num_cores * 2 * 4 * lanes**2 * chip.clock_hz
    self.assertAlmostEqual(peak / chip.bf16_flops_per_sec, 1, delta=0.01)

  # Google's published figures, of a chip; a v7x chip is two devices.
  @parameterized.parameters(
      ("v4", 1, 275e12, 1.228e12, 32 * 2**30),
      ("v5e", 1, 197e12, 819e9, 16e9),
      ("v5p", 1, 459e12, 2.765e12, 95 * 2**30),
      ("v6e", 1, 918e12, 1.638e12, 32 * 2**30),
      ("v7x", 2, 2307e12, 7.38e12, 192 * 2**30),
      ("h100", 1, 989e12, 3.35e12, 80e9),
  )
  def test_published_figures(self, name, num_devices, flops, bandwidth, size):
    chip = chips.get_chip(name)
    self.assertEqual(num_devices * chip.bf16_flops_per_sec, flops)
    self.assertEqual(num_devices * chip.hbm_bytes_per_sec, bandwidth)
    self.assertEqual(num_devices * chip.hbm_bytes, size)

  @parameterized.parameters(
      (pltpu.ChipVersion.TPU_V4, "v4", 2),
      (pltpu.ChipVersion.TPU_V5E, "v5e", 1),
      (pltpu.ChipVersion.TPU_V5P, "v5p", 2),
      (pltpu.ChipVersion.TPU_V6E, "v6e", 1),
      (pltpu.ChipVersion.TPU_7X, "v7x", 1),
  )
  def test_jax_rounds_them_and_has_less_for_v5p(self, version, name, cores):
    chip, core = chips.get_chip(name), pltpu.get_tpu_info_for_chip(version, 1)
    ratio = cores * core.bf16_ops_per_second / chip.bf16_flops_per_sec
    self.assertAlmostEqual(ratio, 1, delta=0.003)
    ratio = cores * core.mem_bw_bytes_per_second / chip.hbm_bytes_per_sec
    self.assertAlmostEqual(ratio, 0.89 if name == "v5p" else 1, delta=0.003)
    # GB or GiB.
    ratio = cores * core.hbm_capacity_bytes / chip.hbm_bytes
    self.assertBetween(ratio, 0.99, 1.08)


if __name__ == "__main__":
  absltest.main()
