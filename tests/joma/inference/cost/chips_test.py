"""Two sources of the same chips agree where they should."""

from absl.testing import absltest
from absl.testing import parameterized

from joma.inference.cost import chips
from kernels_pallas.aot import chips as kernel_chips
from scansnap_jax.experiment import errors


class ChipsTest(parameterized.TestCase):

  @parameterized.parameters(*kernel_chips.CHIP_NAMES)
  def test_agrees_with_the_chips_that_kernels_are_compiled_for(self, name):
    ours, theirs = chips.get(name), kernel_chips.get_chip(name)
    devices = 2 if name == "v7x" else 1
    # Rounded differently: 918 or 920 TFLOP/s.
    self.assertAlmostEqual(
        ours.flops_per_sec / (devices * theirs.bf16_flops_per_sec), 1, 2
    )
    # GB or GiB.
    ratio = ours.hbm_bytes / (devices * theirs.hbm_bytes)
    self.assertBetween(ratio, 0.92, 1.01)
    # The page of v5p has 2,765 GB/s, jax 2,460.
    ratio = ours.bytes_per_sec / (devices * theirs.hbm_bytes_per_sec)
    self.assertBetween(ratio, 0.99, 1.13 if name == "v5p" else 1.01)

  def test_the_slower_of_memory_and_arithmetic_counts(self):
    chip = chips.measured(2.0, 3.0)
    self.assertEqual(chip.seconds(4e9, 3e12), 2)
    self.assertEqual(chip.seconds(4e9, 9e12), 3)
    self.assertTrue(chip.fits(1e18))

  def test_an_unknown_chip_is_told_of_the_others(self):
    with self.assertRaisesRegex(errors.UserError, "v9.*v5e.*bandwidth_gbs"):
      chips.get("v9")
    with self.assertRaisesRegex(errors.UserError, "bandwidth_gbs"):
      chips.measured(0, 1)


if __name__ == "__main__":
  absltest.main()
