from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.aot import chips
from kernels_pallas.aot import compile as compile_lib
from kernels_pallas.aot import overflow
from kernels_pallas.aot import topology
from tests.kernels_pallas.aot import programs

_MIB = 2**20


@absltest.skipUnless(topology.has_toolchain("tpu"), "libtpu is not installed")
class CompileForTest(parameterized.TestCase):

  @parameterized.parameters(*chips.TPU_NAMES)
  @pytest.mark.by_default(1)
  def test_sizes_of_a_kernel(self, chip):
    fn, args = programs.matmul(size=512, block=256)
    compiled = compile_lib.compile_for(chip, fn, *args)
    self.assertEqual(compiled.chip.name, chip)
    self.assertEqual(compiled.argument_bytes, 2 * (512 * 512 + 512 * 256))
    self.assertEqual(compiled.output_bytes, 4 * 512 * 256)
    self.assertEqual(compiled.temp_bytes, 0)
    self.assertEqual(compiled.alias_bytes, 0)
    self.assertEqual(compiled.num_custom_calls, 1)
    # The accumulator; and two buffers of each block, unless XLA keeps whole
    # operands in VMEM beside the kernel.
    (vmem_bytes,) = compiled.scoped_vmem_bytes.values()
    self.assertBetween(vmem_bytes, 2**18, 2**18 + 4 * 2**17 + 2 * 2**18 + 2**16)

  @parameterized.parameters(*chips.TPU_NAMES)
  @pytest.mark.by_default(1)
  def test_a_hidden_copy_of_a_cache_is_seen(self, chip):
    fn, args = programs.write_row(donate=True)
    compiled = compile_lib.compile_for(chip, fn, *args)
    self.assertEmpty(compiled.copies)
    self.assertEqual(compiled.alias_bytes, 64 * _MIB)
    fn, args = programs.write_row(donate=False)
    compiled = compile_lib.compile_for(chip, fn, *args)
    self.assertEqual([c.num_bytes for c in compiled.copies], [64 * _MIB])
    self.assertStartsWith(compiled.copies[0].shape, "f32[65536,256]")
    self.assertEqual(compiled.alias_bytes, 0)

  @parameterized.parameters(*chips.TPU_NAMES)
  @pytest.mark.by_default(1)
  def test_blocks_beyond_the_scoped_vmem_are_refused(self, name):
    chip = chips.get_chip(name)
    # Four blocks of f32[block, 4096], a fifth more than fits.
    block = int(1.2 * chip.scoped_vmem_bytes) // (4 * 4 * 4096) // 8 * 8
    fn, args = programs.add_rows(rows=8 * block, cols=4096, block=block)
    with self.assertRaises(overflow.OutOfVmem) as caught:
      compile_lib.compile_for(chip, fn, *args)
    self.assertEqual(caught.exception.limit_bytes, chip.scoped_vmem_bytes)
    ratio = caught.exception.used_bytes / (4 * 4 * 4096 * block)
    self.assertAlmostEqual(ratio, 1, delta=0.01)

  @parameterized.product(name=chips.TPU_NAMES, num_bytes=(_MIB, 2 * _MIB))
  @pytest.mark.by_default(2)
  def test_a_table_beyond_smem_is_refused(self, name, num_bytes):
    chip = chips.get_chip(name)
    fn, args = programs.prefetched(num_scalars=num_bytes // 4)
    with self.assertRaises(overflow.OutOfSmem) as caught:
      compile_lib.compile_for(chip, fn, *args)
    self.assertEqual(caught.exception.limit_bytes, chip.smem_bytes)
    self.assertGreaterEqual(caught.exception.used_bytes, num_bytes)

  def test_flops_of_xla_and_static_arguments(self):
    def power(x, *, exponent):
      return x["matrix"] @ x["matrix"] if exponent == 2 else x["matrix"]

    array = {"matrix": jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)}
    compiled = compile_lib.compile_for("v6e", power, array, exponent=2)
    self.assertEqual(compiled.flops, 2 * 256**3)
    self.assertGreater(compiled.optimal_seconds, 0)
    self.assertEqual(compiled.num_custom_calls, 0)
    compiled = compile_lib.compile_for("v6e", power, array, exponent=1)
    self.assertNotEqual(compiled.flops, 2 * 256**3)

  def test_a_time_with_an_unknown_part_is_none(self):
    array = jax.ShapeDtypeStruct((128, 128), jnp.float32)
    compiled = compile_lib.compile_for("v5e", jnp.linalg.cholesky, array)
    self.assertLess(compiled.executable.cost_analysis()["optimal_seconds"], 0)
    self.assertIsNone(compiled.optimal_seconds)

  def test_what_is_no_overflow_stays_what_it_is(self):
    fn, args = programs.add_rows(rows=1000, cols=1000, block=100)
    with self.assertRaisesRegex(ValueError, "divisible by 8"):
      compile_lib.compile_for("v5e", fn, *args)


if __name__ == "__main__":
  absltest.main()
