import dataclasses

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import interpret
from kernels_pallas.aot import compile as compile_lib
from kernels_pallas.aot import jobs
from kernels_pallas.aot import schedule
from kernels_pallas.aot import topology
from kernels_pallas.gated_delta_rule import api
from kernels_pallas.gated_delta_rule import output
from kernels_pallas.gated_delta_rule import pallas_tpu
from kernels_pallas.gated_delta_rule import shapes
from kernels_pallas.gated_delta_rule import tpu_plan
from tests.kernels_pallas import conformance
from tests.kernels_pallas.gated_delta_rule import oracle

_CHIPS = ("v4", "v5e", "v5p", "v6e", "v7x")
_SMALL = shapes.Shape(
    length=40, num_heads=2, num_key_heads=1, key_size=16, value_size=16
)
# What the kernels are compared by: B 4, T 4096, N 8.
_LONG = shapes.BENCHMARKS["h128_128_4k"]


def _attend(config, *arrays):
  *arrays, state = arrays
  return api.gated_delta_rule(
      *arrays,
      initial_state=state,
      implementation="pallas_tpu",
      config=config,
  )


def _both(config):
  """Forward and backward, with states in and out."""

  def both(d_out, *arrays):
    result, pullback = jax.vjp(lambda *x: _attend(config, *x), *arrays)
    return result, pullback(
        output.GatedDeltaRuleOutput(d_out.astype(result.out.dtype), result[1])
    )

  return both


def _run(shape, config):
  case = oracle.draw(shape, "float32")
  return jax.jit(_both(config))(case.d_out, *case.arguments().values())


def _compile(chip, shape, dtype=jnp.bfloat16, config=None):
  arrays = (*shape.arrays(dtype), shape.state())
  return compile_lib.compile_for(chip, _both(config), arrays[2], *arrays)


class ConfigTest(parameterized.TestCase):

  @pytest.mark.slow
  def test_results_depend_neither_on_chunk_nor_on_heads(self):
    with interpret.interpreted():
      one, other = (
          _run(_SMALL, pallas_tpu.Config(chunk=chunk, heads=heads))
          for chunk, heads in ((16, 1), (32, 2))
      )
    conformance.check_equal(one, other, 1e-5)

  @parameterized.parameters(0, 8, 48)
  def test_a_chunk_that_no_kernel_has(self, chunk):
    with self.assertRaisesRegex(ValueError, f"chunk={chunk} must be a power"):
      pallas_tpu.Config(chunk=chunk)

  def test_of_no_head(self):
    with self.assertRaisesRegex(ValueError, "heads=0 must be at least 1"):
      pallas_tpu.Config(heads=0)

  @parameterized.parameters(
      (8, 8, 4, 4), (8, 2, 4, 4), (8, 1, 4, 4), (6, 2, 4, 3), (5, 1, 4, 1)
  )
  def test_heads_of_a_step_share_key_heads_or_have_them_all(
      self, num_heads, num_key_heads, most, expected
  ):
    shape = dataclasses.replace(
        _SMALL, num_heads=num_heads, num_key_heads=num_key_heads
    )
    case = oracle.draw(shape, "float32")
    config = pallas_tpu.Config(heads=most)
    with interpret.interpreted():
      jaxpr = jax.make_jaxpr(lambda *x: _attend(config, *x))(
          *case.arguments().values()
      )
    self.assertIn(f"f32[{expected},16,16]", str(jaxpr))


class FitTest(absltest.TestCase):
  """What does not fit is refused by us, with figures; chips are v5e here."""

  def _refused(self, message, dtype, config=None, size=16):
    shape = dataclasses.replace(_SMALL, length=4096, key_size=size)
    arrays = (*shape.arrays(dtype), shape.state())
    with interpret.interpreted(), self.assertRaisesRegex(ValueError, message):
      jax.eval_shape(lambda *x: _attend(config, *x), *arrays)

  def test_a_chunk_beyond_vmem(self):
    self._refused(
        r"chunk=2048 of one head with key size 16 and value size 16 needs .*"
        r" MiB of VMEM: arrays .* \+ states .* \+ registers .*; a TPU .* has"
        r" 128\.0 MiB, of which .* 120\.0: use a smaller chunk",
        jnp.bfloat16,
        pallas_tpu.Config(chunk=2048),
    )

  def test_a_type_that_a_tpu_has_not(self):
    self._refused("are float16; the TPU kernels take float32", jnp.float16)


class MemoryTest(absltest.TestCase):
  """In TPU interpret mode, which finds races and reads out of bounds."""

  @pytest.mark.slow
  def test_is_used_without_races(self):
    config = pallas_tpu.Config(chunk=16)
    mode = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    try:
      with interpret.interpreted(mode):
        found = jax.block_until_ready(_run(_SMALL, config))
        races = interpret_pallas_call.races.races_found
    finally:
      pltpu.reset_tpu_interpret_mode_state()
    self.assertFalse(races)
    with interpret.interpreted():
      conformance.check_equal(_run(_SMALL, config), found, 1e-6)


def program(length):
  """Gradients of two heads; see `jobs.Job`."""
  shape = dataclasses.replace(
      _LONG, batch=1, length=length, num_heads=2, num_key_heads=2
  )
  arrays = (*shape.arrays(), shape.state())
  return _both(None), (arrays[2], *arrays)


@absltest.skipUnless(topology.has_toolchain("tpu"), "libtpu is not installed")
class ScheduleTest(absltest.TestCase):

  @pytest.mark.slow
  def test_bundles_of_a_token_do_not_grow_with_the_length(self):
    lengths = 4096, 65_536
    reports = schedule.report([
        jobs.Job("v5e", f"{__name__}:program", {"length": length})
        for length in lengths
    ])
    one, other = (
        np.array([kernel.issued for kernel in report.kernels]) / length
        for report, length in zip(reports, lengths, strict=True)
    )
    self.assertLen(one, 3)
    np.testing.assert_allclose(other, one, rtol=0.05)


@absltest.skipUnless(topology.has_toolchain("tpu"), "libtpu is not installed")
@pytest.mark.slow
class CompileTest(parameterized.TestCase):

  @parameterized.product(
      chip=_CHIPS, value_size=(128, 256), is_by_channel=(False, True)
  )
  def test_every_chip_takes_both_passes(self, chip, value_size, is_by_channel):
    shape = dataclasses.replace(
        _LONG, value_size=value_size, is_by_channel=is_by_channel
    )
    compiled = _compile(chip, shape)
    # Forward, the states of the chunks' starts, and the way back.
    self.assertLen(compiled.scoped_vmem_bytes, 3)
    for name in compiled.scoped_vmem_bytes:
      self.assertIn("gated_delta_rule", name)
    text = str(compiled.jaxpr)
    # No array has pairs of positions, and the state is float32 throughout.
    self.assertNotIn("4096,4096", text)
    self.assertNotIn(f"bf16[4,8,128,{value_size}]", text)
    # Beside copies of arguments and results, laid out by heads, there are the
    # states of the chunks' starts.
    starts = 4 * np.prod(shape.state().shape) * shape.length // 64
    arrays = compiled.argument_bytes + compiled.output_bytes
    self.assertLess(compiled.temp_bytes, starts + 2 * arrays)

  @parameterized.product(
      chip=("v4", "v5e"),
      dtype=("bfloat16", "float32"),
      is_by_channel=(False, True),
      sizes=((64, 128, 256), (128, 64, 64)),
  )
  def test_takes_less_vmem_than_we_say(self, chip, dtype, is_by_channel, sizes):
    chunk, key_size, value_size = sizes
    shape = dataclasses.replace(
        _LONG,
        batch=1,
        # So long that XLA does not keep operands in VMEM beside the kernel.
        length=1 << 16,
        num_heads=1,
        num_key_heads=1,
        key_size=key_size,
        value_size=value_size,
        is_by_channel=is_by_channel,
    )
    compiled = _compile(chip, shape, dtype, pallas_tpu.Config(chunk=chunk))
    need = tpu_plan.vmem(
        chunk, 1, key_size, value_size, is_by_channel, jnp.dtype(dtype).itemsize
    )
    taken = max(compiled.scoped_vmem_bytes.values())
    self.assertBetween(sum(need.values()), taken, 6 * taken)


if __name__ == "__main__":
  absltest.main()
