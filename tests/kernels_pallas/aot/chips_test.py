from absl.testing import absltest
from absl.testing import parameterized

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
      ("v4", 1, 275e12, 1.2e12, 32),
      ("v5e", 1, 197e12, 819e9, 16),
      ("v5p", 1, 459e12, 2.765e12, 95),
      ("v6e", 1, 918e12, 1.64e12, 32),
      ("v7x", 2, 2307e12, 7.37e12, 192),
      ("h100", 1, 989e12, 3.35e12, 80),
  )
  def test_published_figures(self, name, num_devices, flops, bandwidth, gib):
    chip = chips.get_chip(name)
    ratio = num_devices * chip.bf16_flops_per_sec / flops
    self.assertAlmostEqual(ratio, 1, delta=0.01)
    # JAX has 2.46e12 for v5p.
    ratio = num_devices * chip.hbm_bytes_per_sec / bandwidth
    self.assertAlmostEqual(ratio, 1, delta=0.12)
    ratio = num_devices * chip.hbm_bytes / gib / 1e9
    self.assertAlmostEqual(ratio, 1, delta=0.09)


if __name__ == "__main__":
  absltest.main()
