from absl.testing import absltest
from absl.testing import parameterized

from joma.inference.cost import chips
from kernels_pallas.aot import chips as kernel_chips
from scansnap_jax.experiment import errors


class ChipsTest(parameterized.TestCase):

  @parameterized.parameters(*kernel_chips.CHIP_NAMES)
  def test_is_that_of_the_devices_that_kernels_are_compiled_for(self, name):
    ours, theirs = chips.get(name), kernel_chips.get_chip(name)
    devices = 2 if name == "v7x" else 1
    self.assertEqual(ours.flops_per_sec, devices * theirs.bf16_flops_per_sec)
    self.assertEqual(ours.bytes_per_sec, devices * theirs.hbm_bytes_per_sec)
    self.assertEqual(ours.hbm_bytes, devices * theirs.hbm_bytes)

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
