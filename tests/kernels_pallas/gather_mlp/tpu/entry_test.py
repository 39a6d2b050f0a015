import dataclasses
from unittest import mock

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
from kernels_pallas.aot import topology
from kernels_pallas.gather_mlp import api
from kernels_pallas.gather_mlp import heads
from kernels_pallas.gather_mlp import shapes
from kernels_pallas.gather_mlp.tpu import entry
from kernels_pallas.hardware import tpu_layout
from tests.kernels_pallas import conformance
from tests.kernels_pallas.gather_mlp import oracle

_CHIPS = ("v4", "v5e", "v5p", "v6e", "v7x")
_SMALL = shapes.Shape(batch=12, width=24, num_neurons=64, block_size=16)
_WHOLE = {}
_CUT = {"rows": 8, "batch": 8}


def _both(case, **sizes):
  """Compiled value and gradients, with these sizes."""
  config = entry.Config(**sizes)

  def call(arrays, block_ids, num_valid):
    return api.gather_mlp(
        **arrays,
        block_ids=block_ids,
        num_valid=num_valid,
        activation=case.activation,
        block_size=case.block_size,
        implementation="pallas_tpu",
        config=config,
    )

  return oracle.both_passes(call)


def _small_case(is_gated=True):
  shape = dataclasses.replace(_SMALL, is_gated=is_gated, has_bias=True)
  return oracle.draw(
      shape, "float32", "silu", num_chosen=3, per_sequence=True, is_ragged=True
  )


class SizesTest(parameterized.TestCase):

  @pytest.mark.slow
  def test_results_do_not_depend_on_them(self):
    # Of tiles of the batch, gradients of the weights are summed in HBM.
    case = _small_case()
    arguments = (case.arrays, case.block_ids, case.num_valid, case.d_out)
    with interpret.interpreted():
      whole, cut = (_both(case, **x)(*arguments) for x in (_WHOLE, _CUT))
    conformance.check_equal(whole, cut, 1e-6)

  @pytest.mark.slow
  def test_two_cores_share_the_blocks(self):
    case = _small_case(is_gated=False)
    two = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion.TPU_V5P, 2)
    with mock.patch.object(tpu_layout, "tpu_info", return_value=two):
      oracle.check(_both(case), case, "pallas_tpu")


class FitTest(parameterized.TestCase):
  """What does not fit is refused by us, with figures; chips are v5e here."""

  def _trace(self, shape, dtype="bfloat16", **sizes):
    x, weights = shape.arrays(dtype)

    def call(x, up, down):
      return api.gather_mlp(
          x,
          up,
          down,
          np.arange(2),
          block_size=shape.block_size,
          implementation="pallas_tpu",
          config=entry.Config(**sizes),
      )

    with interpret.interpreted():
      jax.eval_shape(call, x, weights.up, weights.down)

  def test_a_slab_beyond_vmem(self):
    shape = shapes.Shape(
        batch=1, width=16_384, num_neurons=4096, block_size=1024
    )
    message = (
        r"1024 neurons of width 16384 and 16 sequences at a time need 1\d\d\.\d"
        r" MiB of VMEM: x 1\.0 \+ sums 2\.0 \+ slabs 128\.0 \+ registers"
        r" .*has 128\.0 MiB, of which .* 120\.0: use smaller rows or batch"
    )
    with self.assertRaisesRegex(ValueError, message):
      self._trace(shape, rows=1024)
    self._trace(shape)  # Cuts it.

  @parameterized.parameters(
      ({"rows": 12}, "rows=12 must be a positive multiple of 8"),
      ({"batch": 0}, "batch=0 must be a positive multiple"),
      (
          {"rows": 8},
          "rows=8 must divide block_size=128 and be a multiple of 16",
      ),
      ({"rows": 96}, "rows=96 must divide"),
      ({"batch": 8}, "batch=8 must be a multiple of 16"),
  )
  def test_sizes_that_fill_no_registers(self, sizes, message):
    shape = shapes.Shape(batch=1, width=64, num_neurons=256)
    with self.assertRaisesRegex(ValueError, message):
      self._trace(shape, **sizes)

  def test_blocks_and_types_that_a_tpu_has_not(self):
    shape = shapes.Shape(batch=1, width=64, num_neurons=240, block_size=24)
    with self.assertRaisesRegex(ValueError, "block_size=24 must be a multiple"):
      self._trace(shape)
    with self.assertRaisesRegex(ValueError, "are float16; the TPU kernels"):
      self._trace(_SMALL, "float16")

  def test_heads_beyond_vmem(self):
    call = lambda x, kernel: heads.project_in(
        x, kernel, np.arange(64), implementation="pallas_tpu"
    )
    x = jax.ShapeDtypeStruct((1, 1 << 17), jnp.bfloat16)
    kernel = jax.ShapeDtypeStruct((64, 256, 1 << 17), jnp.bfloat16)
    with interpret.interpreted():
      with self.assertRaisesRegex(ValueError, "64 heads of 256 and 16 seq"):
        jax.eval_shape(call, x, kernel)


class MemoryTest(parameterized.TestCase):
  """In TPU interpret mode, which finds races and reads out of bounds."""

  @pytest.mark.slow
  def test_is_used_without_races(self):
    shape = shapes.Shape(batch=3, width=8, num_neurons=40, block_size=8)
    self._check(shape)

  @pytest.mark.slow
  def test_of_tiles_and_slabs(self):
    shape = shapes.Shape(
        batch=9,
        width=16,
        num_neurons=64,
        block_size=16,
        is_gated=True,
        has_bias=True,
    )
    self._check(shape, **_CUT)

  def _check(self, shape, **sizes):
    case = oracle.draw(
        shape, "float32", num_chosen=4, per_sequence=True, is_ragged=True
    )
    arguments = (case.arrays, case.block_ids, case.num_valid, case.d_out)
    found = self._run(_both(case, **sizes), *arguments)
    with interpret.interpreted():
      want = _both(case, **sizes)(*arguments)
    conformance.check_equal(want, found, 1e-6)

  @pytest.mark.slow
  def test_of_heads(self):
    x, kernel = jnp.ones((3, 16)), jnp.ones((4, 8, 16))

    def call(x, kernel):
      ids = np.array([3, 1, 7])
      parts = heads.project_in(
          x, kernel, ids, num_valid=2, implementation="pallas_tpu"
      )
      return parts, heads.project_out(
          parts, kernel, ids, num_valid=2, implementation="pallas_tpu"
      )

    parts, out = self._run(jax.jit(call), x, kernel)
    np.testing.assert_array_equal(parts[:, :2], np.full((3, 2, 8), 16))
    np.testing.assert_array_equal(parts[:, 2], np.zeros((3, 8)))
    np.testing.assert_array_equal(out, np.full((3, 16), 2 * 8 * 16))

  def _run(self, call, *arguments):
    mode = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    try:
      with interpret.interpreted(mode):
        found = jax.block_until_ready(call(*arguments))
        races = interpret_pallas_call.races.races_found
    finally:
      pltpu.reset_tpu_interpret_mode_state()
    self.assertFalse(races)
    return found


def _compile(chip, shape, num_chosen, dtype, per_sequence, config=None):
  """Forward and backward, with everything that is optional."""
  x, weights = shape.arrays(dtype)
  given = {k: v for k, v in weights._asdict().items() if v is not None}
  lists = (shape.batch,) if per_sequence else ()
  ids = jax.ShapeDtypeStruct((*lists, num_chosen), jnp.int32)
  num = jax.ShapeDtypeStruct(lists, jnp.int32)

  def both(x, given, ids, num, d_out):
    def call(x, given):
      return api.gather_mlp(
          x,
          **given,
          block_ids=ids,
          num_valid=num,
          activation="gelu" if shape.is_gated else "relu",
          block_size=shape.block_size,
          implementation="pallas_tpu",
          config=config,
      )

    y, pullback = jax.vjp(call, x, given)
    return y, pullback(d_out)

  return compile_lib.compile_for(chip, both, x, given, ids, num, x)


def _compile_heads(chip, dtype):
  x = jax.ShapeDtypeStruct((16, 2048), dtype)
  kernel = jax.ShapeDtypeStruct((16, 128, 2048), dtype)
  ids = jax.ShapeDtypeStruct((16, 4), jnp.int32)

  def both(x, kernel, ids):
    options = {"implementation": "pallas_tpu"}
    parts = heads.project_in(x, kernel, ids, **options)
    return heads.project_out(parts, kernel, ids, **options)

  return compile_lib.compile_for(chip, both, x, kernel, ids)


@absltest.skipUnless(topology.has_toolchain("tpu"), "libtpu is not installed")
class CompileTest(parameterized.TestCase):

  @parameterized.parameters(*_CHIPS)
  @pytest.mark.by_default(1)
  def test_every_chip_takes_both_passes(self, chip):
    shape = shapes.Shape(
        batch=16, width=1024, num_neurons=4096, is_gated=True, has_bias=True
    )
    compiled = _compile(chip, shape, 4, jnp.bfloat16, True)
    self.assertLen(compiled.scoped_vmem_bytes, 2)
    self.assertEmpty(compiled.copies)
    # Gradients are outputs that kernels write into: nothing of their size.
    self.assertLess(compiled.temp_bytes, compiled.output_bytes // 8)

  @parameterized.parameters(*_CHIPS)
  @pytest.mark.by_default(1)
  def test_heads(self, chip):
    compiled = _compile_heads(chip, jnp.bfloat16)
    self.assertLen(compiled.scoped_vmem_bytes, 2)
    self.assertEmpty(compiled.copies)

  def test_without_a_list_per_sequence_nothing_is_allocated(self):
    shape = shapes.BENCHMARKS["opt_6.7b"]
    x, weights = shape.arrays()

    def call(x, up, down, ids, num):
      return api.gather_mlp(
          x, up, down, ids, num_valid=num, implementation="pallas_tpu"
      )

    scalars = (jax.ShapeDtypeStruct(s, jnp.int32) for s in ((13,), ()))
    arguments = (x, weights.up, weights.down, *scalars)
    compiled = compile_lib.compile_for("v5e", call, *arguments)
    self.assertEqual(compiled.temp_bytes, 0)
    self.assertEmpty(compiled.copies)


@pytest.mark.slow
@absltest.skipUnless(topology.has_toolchain("tpu"), "libtpu is not installed")
class CompileManyTest(parameterized.TestCase):

  @parameterized.product(
      chip=_CHIPS,
      dtype=(jnp.bfloat16, jnp.float32),
      batch=(1, 16, 600),
      per_sequence=(False, True),
  )
  def test_takes_less_vmem_than_we_say(self, chip, dtype, batch, per_sequence):
    shape = shapes.Shape(
        batch=batch,
        width=4096,
        num_neurons=16_384,
        is_gated=True,
        has_bias=True,
    )
    # The kernels' own limit: too low an estimate does not compile.
    compiled = _compile(chip, shape, 13, dtype, per_sequence)
    limit = compile_lib.chips.get_chip(chip).vmem_bytes * 15 // 16
    for taken in compiled.scoped_vmem_bytes.values():
      self.assertLessEqual(taken, limit)


if __name__ == "__main__":
  absltest.main()
