import functools

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import pytest

from kernels_pallas import interpret
from kernels_pallas.aot import compile as compile_lib
from kernels_pallas.aot import topology
from kernels_pallas.linear_attention import api
from kernels_pallas.linear_attention import pallas_tpu
from kernels_pallas.linear_attention import shapes
from kernels_pallas.linear_attention import sweep as sweep_lib
from tests.kernels_pallas import conformance
from tests.kernels_pallas.linear_attention import oracle

_CHIPS = ("v4", "v5e", "v5p", "v6e", "v7x")


def _attend(chunk, **arguments):
  return api.linear_attention(
      **arguments,
      implementation="pallas_tpu",
      config=pallas_tpu.Config(chunk=chunk),
  )


def _sweep(is_reversed, chunk=128):
  """A sweep over 300 positions of a head, and its state."""
  shape = shapes.Shape(length=300, num_heads=1, num_kv_heads=1, head_dim=16)
  case = oracle.draw(shape, "float32", "slow")
  sweep = sweep_lib.Sweep(
      is_reversed=is_reversed,
      in_scale=0.5,
      out_scale=0.25,
      config=pallas_tpu.Config(chunk=chunk),
  )
  arrays = (case.query, case.key, case.value, jnp.log(case.decay))
  operands = sweep_lib.Operands(*arrays, case.initial_state)
  return pallas_tpu.run(operands, sweep)


class ChunkTest(parameterized.TestCase):

  @parameterized.parameters(False, True)
  @pytest.mark.by_default(1)
  def test_results_do_not_depend_on_the_chunk(self, is_reversed):
    with interpret.interpreted():
      one, other = (_sweep(is_reversed, chunk) for chunk in (128, 256))
    conformance.check_equal(one, other, 1e-6)


class FitTest(parameterized.TestCase):
  """What does not fit is refused by us, with figures; chips are v5e here."""

  def test_a_chunk_beyond_vmem(self):
    array = jax.ShapeDtypeStruct((1, 8192, 1, 128), jnp.bfloat16)
    message = (
        r"chunk=8192 with head_dim=128 needs .* MiB of VMEM: query, key, value"
        r" and out 20\.0 \+ states 0\.3 \+ powers 256\.0 \+ .* has 128\.0 MiB,"
        r" of which .* 120\.0: use a smaller chunk"
    )
    attend = lambda *x: _attend(
        8192, **dict(zip(("query", "key", "value"), x, strict=True))
    )
    with interpret.interpreted(), self.assertRaisesRegex(ValueError, message):
      jax.eval_shape(attend, array, array, array)

  @parameterized.parameters(0, 100, -128)
  def test_a_chunk_that_wastes_lanes(self, chunk):
    with self.assertRaisesRegex(
        ValueError, f"chunk={chunk} must be a multiple"
    ):
      pallas_tpu.Config(chunk=chunk)

  def test_a_type_that_a_tpu_has_not(self):
    array = jnp.zeros((1, 8, 1, 8), jnp.float16)
    with (
        interpret.interpreted(),
        self.assertRaisesRegex(ValueError, "are float16; the TPU kernels take"),
    ):
      _attend(128, query=array, key=array, value=array)


class MemoryTest(parameterized.TestCase):
  """In TPU interpret mode, which finds races and reads out of bounds."""

  @parameterized.parameters(False, True)
  @pytest.mark.slow
  def test_is_used_without_races(self, is_reversed):
    mode = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    try:
      with interpret.interpreted(mode):
        sweep = jax.jit(functools.partial(_sweep, is_reversed))
        found = jax.block_until_ready(sweep())
        races = interpret_pallas_call.races.races_found
    finally:
      pltpu.reset_tpu_interpret_mode_state()
    self.assertFalse(races)
    with interpret.interpreted():
      conformance.check_equal(_sweep(is_reversed), found, 1e-6)


def _compile(chip, shape, dtype, config=None):
  """Forward and backward, with states in and out."""

  def both(query, key, value, state, d_out):
    def attend(*arrays):
      return api.linear_attention(
          *arrays[:3],
          decay=jnp.full(shape.num_heads, 0.9),
          initial_state=arrays[3],
          return_state=True,
          implementation="pallas_tpu",
          config=config,
      )

    result, pullback = jax.vjp(attend, query, key, value, state)
    return result, pullback(result._replace(out=d_out))

  arrays = shape.arrays(dtype)
  states = (shape.batch, shape.num_heads, shape.head_dim, shape.head_dim)
  state = jax.ShapeDtypeStruct(states, jnp.float32)
  return compile_lib.compile_for(chip, both, *arrays, state, arrays[0])


@absltest.skipUnless(topology.has_toolchain("tpu"), "libtpu is not installed")
class CompileTest(parameterized.TestCase):

  @parameterized.parameters(*_CHIPS)
  @pytest.mark.by_default(1)
  def test_every_chip_takes_both_passes(self, chip):
    shape = shapes.Shape(length=512, num_heads=2, num_kv_heads=1, head_dim=128)
    compiled = _compile(chip, shape, jnp.bfloat16)
    self.assertLen(compiled.scoped_vmem_bytes, 4)
    # A chunk is twice the side of a matrix unit: powers of 256^2 or 512^2.
    powers = str(compiled.jaxpr)
    chunk = 512 if chip in ("v6e", "v7x") else 256
    self.assertIn(f"f32[{chunk},{chunk}]", powers)
    self.assertNotIn(f"f32[{768 - chunk},{768 - chunk}]", powers)
    for name in compiled.scoped_vmem_bytes:
      self.assertIn("linear_attention", name)
    # Copies of arguments and results, which are laid out by heads: nothing of
    # the 2 x 512 x 512 pairs.
    arrays = compiled.argument_bytes + compiled.output_bytes
    self.assertLess(compiled.temp_bytes, 2 * arrays)


@pytest.mark.slow
@absltest.skipUnless(topology.has_toolchain("tpu"), "libtpu is not installed")
class CompileManyTest(parameterized.TestCase):

  @parameterized.product(
      chip=_CHIPS,
      dtype=(jnp.bfloat16, jnp.float32),
      sizes=((256, 128), (128, 96), (512, 64), (128, 512)),
  )
  def test_takes_less_vmem_than_we_say(self, chip, dtype, sizes):
    chunk, head_dim = sizes
    # So long that XLA does not keep operands in VMEM beside the kernel.
    shape = shapes.Shape(
        length=1 << 16, num_heads=2, num_kv_heads=1, head_dim=head_dim
    )
    config = pallas_tpu.Config(chunk=chunk)
    compiled = _compile(chip, shape, dtype, config)
    need = pallas_tpu.vmem(chunk, head_dim, jnp.dtype(dtype).itemsize)
    taken = max(compiled.scoped_vmem_bytes.values())
    self.assertBetween(sum(need.values()), taken, 4 * taken)

  @parameterized.product(chip=("v4",), dtype=(jnp.bfloat16, jnp.float32))
  def test_the_largest_chunk_that_we_let_through_compiles(self, chip, dtype):
    limit = compile_lib.chips.get_chip(chip).vmem_bytes * 15 // 16
    itemsize = jnp.dtype(dtype).itemsize
    chunk = max(
        n
        for n in range(128, 4096, 128)
        if sum(pallas_tpu.vmem(n, 128, itemsize).values()) <= limit
    )
    shape = shapes.Shape(
        length=1 << 16, num_heads=2, num_kv_heads=1, head_dim=128
    )
    _compile(chip, shape, dtype, pallas_tpu.Config(chunk=chunk))
    with self.assertRaisesRegex(ValueError, "use a smaller chunk"):
      _compile(chip, shape, dtype, pallas_tpu.Config(chunk=chunk + 128))


if __name__ == "__main__":
  absltest.main()
