"""The TPU kernels of `tpu_forward` and `tpu_col_mass`, as ops call them."""

import dataclasses
import functools
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
from kernels_pallas import masks
from kernels_pallas import selection as selection_lib
from kernels_pallas.aot import compile as compile_lib
from kernels_pallas.aot import topology
from kernels_pallas.attention import api
from kernels_pallas.attention import shapes
from kernels_pallas.attention import visits
from kernels_pallas.attention.tpu import fetch
from kernels_pallas.attention.tpu import layout
from kernels_pallas.attention.tpu import plan
from kernels_pallas.hardware import tpu_tile
from tests.kernels_pallas import conformance

_CHIPS = ("v4", "v5e", "v5p", "v6e", "v7x")
# By Config.col_mass, or without column sums: the kernels that are called.
_KERNELS = {
    None: ("attention_forward",),
    "strip": ("attention_strip",),
    "two_pass": ("attention_forward", "attention_col_mass"),
}
_SMALL = plan.AttentionTpuConfig(block_q=128, block_kv=128)


def _attend(config, mask, emits_col_mass=True):
  """Attention as a function of query, key and value: (out, lse, col_mass)."""

  def attend(query, key, value):
    found = api.attention(
        query,
        key,
        value,
        where=mask,
        return_lse=True,
        return_col_mass=emits_col_mass,
        implementation="pallas_tpu",
        config=config,
    )
    return found.out, found.lse, found.col_mass

  return attend


def _draw(shape, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 3)
  return [
      jax.random.normal(key, array.shape, dtype)
      for key, array in zip(keys, shape.arrays(), strict=True)
  ]


class TilesTest(parameterized.TestCase):
  """Results do not depend on how a computation is cut."""

  def _check(self, attends, arrays):
    """Values to 1e-6, gradients to twice that, of their largest."""
    shape = jax.eval_shape(attends[0], *arrays)
    cotangents = [
        jax.random.normal(jax.random.key(i), x.shape)
        for i, x in enumerate(shape[:2])
    ]

    def run(attend):
      def outputs(*arrays):
        out, lse, col_mass = attend(*arrays)
        return (out, lse), col_mass

      values, pullback, col_mass = jax.vjp(outputs, *arrays, has_aux=True)
      return (values, col_mass), pullback(tuple(cotangents))

    one, *others = (jax.jit(functools.partial(run, x))() for x in attends)
    for other in others:
      conformance.check_equal(one[0], other[0], 1e-6)
      conformance.check_equal(one[1], other[1], 2e-6)

  @pytest.mark.slow
  def test_of_dense_attention(self):
    self._check_dense(
        (128, 128, "vmem", "strip"), (256, 128, "hbm", "two_pass")
    )

  @pytest.mark.slow
  def test_of_dense_attention_by_other_ways(self):
    self._check_dense(
        (128, 128, "vmem", "strip"),
        (256, 128, "hbm", "strip"),
        (128, 384, "vmem_once", "two_pass"),
    )

  def _check_dense(self, *sizes):
    shape, mask = shapes.square(384, 2, 1, 32), masks.causal(384)
    configs = [
        plan.AttentionTpuConfig(block_q=q, block_kv=kv, keys=keys, col_mass=how)
        for q, kv, keys, how in sizes
    ]
    with interpret.interpreted():
      self._check([_attend(x, mask) for x in configs], _draw(shape))

  @pytest.mark.slow
  def test_of_selected_blocks(self):
    # The same pairs as blocks of 256 x 256 and of 128 x 128.
    table = np.array([[[0, 0], [1, 0]], [[0, 0], [0, 1]]], np.int32)[None]
    num_valid = np.array([[1, 1], [1, 2]], np.int32)[None]
    mask = masks.causal(512)
    whole = selection_lib.Selection(table, num_valid, mask, 256, 256)
    narrow = dataclasses.replace(
        whole,
        block_table=table.repeat(2, axis=2),
        num_valid=num_valid.repeat(2, axis=2),
        block_q=128,
    )
    halves = 2 * narrow.block_table[..., None] + np.arange(2, dtype=np.int32)
    small = dataclasses.replace(
        narrow,
        block_table=halves.reshape(1, 2, 4, 4),
        num_valid=2 * narrow.num_valid,
        block_kv=128,
    )

    def attend(selection, query, key, value):
      found = api.attention(
          query,
          key,
          value,
          where=selection,
          return_lse=True,
          return_col_mass=True,
          implementation="pallas_tpu",
      )
      return found.out, found.lse, found.col_mass

    with interpret.interpreted():
      self._check(
          [functools.partial(attend, x) for x in (whole, small)],
          _draw(shapes.square(512, 2, 1, 32)),
      )

  @pytest.mark.slow
  def test_rows_of_any_length_may_follow_each_other(self):
    # Sweep 3 of a row is done along the next: longer, shorter, or empty.
    lengths = np.array([300, 512, 0, 512, 130, 0], np.int32)
    stops = lengths.repeat(128)[None]
    mask = masks.Mask(np.zeros_like(stops), stops)
    shape = shapes.Shape(
        num_queries=768, num_keys=512, num_heads=2, num_kv_heads=2, head_dim=32
    )
    configs = [
        dataclasses.replace(_SMALL, col_mass=how) for how in _KERNELS if how
    ]
    arrays = _draw(shape)
    with interpret.interpreted():
      strip, second = (jax.jit(_attend(x, mask))(*arrays) for x in configs)
    conformance.check_equal(second[2], strip[2], 1e-6)
    # Each of the 4 * 128 queries that see keys hands out a mass of 1.
    np.testing.assert_allclose(strip[2].sum(axis=-1), 512.0, rtol=1e-6)


class MemoryTest(parameterized.TestCase):
  """In TPU interpret mode, which finds races and reads out of bounds."""

  def _races(self, col_mass):
    """Whether 4 steps of each kernel have any, what they give and should."""
    arrays = _draw(shapes.square(256, 2, 1, 32))
    config = dataclasses.replace(_SMALL, keys="hbm", col_mass=col_mass)
    attend = _attend(config, masks.causal(256), col_mass is not None)
    mode = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    try:
      with interpret.interpreted(mode):
        # Functions of their own: a trace of one mode is none of the other.
        simulated = jax.jit(lambda *x: attend(*x))
        found = jax.block_until_ready(simulated(*arrays))
        races = interpret_pallas_call.races.races_found
    finally:
      pltpu.reset_tpu_interpret_mode_state()
    with interpret.interpreted():
      expected = jax.jit(lambda *x: attend(*x))(*arrays)
    return races, found, expected

  @parameterized.parameters(*_KERNELS)
  @pytest.mark.slow
  def test_is_used_without_races(self, col_mass):
    races, found, expected = self._races(col_mass)
    self.assertFalse(races)
    conformance.check_equal(expected, found, 1e-6)

  @pytest.mark.slow
  def test_a_tile_that_is_not_waited_for_is_a_race(self):
    def read(self, i, high):
      self._copy(i).start()
      tile = self.buffers[i & 1]
      self._copy(i).wait()
      return tile

    with (
        mock.patch.object(fetch.Streamed, "open", lambda *_: None),
        mock.patch.object(fetch.Streamed, "read", read),
    ):
      self.assertTrue(self._races(None)[0])


class FitTest(parameterized.TestCase):
  """What does not fit is refused by us, with figures; chips are v5e here."""

  @parameterized.named_parameters(
      (
          "tile",
          8192,
          {"block_q": 8192, "block_kv": 8192},
          r"block_q=8192 x block_kv=8192 needs .* MiB of VMEM: logits 256\.0 \+"
          r" .* has 128\.0 MiB, of which .* 120\.0: use smaller tiles",
      ),
      (
          "strip",
          65_536,
          {"block_q": 1024, "block_kv": 1024, "col_mass": "strip"},
          r"block_q=1024 .* logits 256\.0 .* smaller tiles or"
          " col_mass='two_pass'",
      ),
      (
          "second_pass",
          1 << 22,
          {"block_q": 1024, "block_kv": 1024, "col_mass": "two_pass"},
          r"block_q=1024 .* rows 224\.0 .* smaller tiles or fewer queries",
      ),
  )
  @pytest.mark.by_default("tile", "strip")
  def test_vmem(self, length, config, message):
    array = jax.ShapeDtypeStruct((1, length, 1, 128), jnp.bfloat16)
    attend = _attend(plan.AttentionTpuConfig(**config), masks.causal(length))
    with interpret.interpreted(), self.assertRaisesRegex(ValueError, message):
      jax.eval_shape(attend, array, array, array)

  def test_smem(self):
    table = np.zeros((1, 1, 1, 70_000), np.int32)
    num = np.full((1, 1, 1), 70_000, np.int32)
    lists = visits.Visits(table, num, num)
    sizes = layout.Sizes(1, 1, 1, 128, 128, 128, 2)
    arguments = (
        *(_SMALL, sizes, layout.Tiles(128, 128), lists),
        tpu_tile.Logits(1.0, None),
    )
    message = "lists of 70000 tiles, 1.1 MiB of SMEM, of which there are 0.9"
    with interpret.interpreted():
      with self.assertRaisesRegex(ValueError, message):
        plan.forward_plan(*arguments, False)
      with self.assertRaisesRegex(ValueError, message):
        plan.col_mass_plan(*arguments)

  def test_long_rows_take_lower_tiles_before_a_second_pass(self):
    choose = functools.partial(plan.tiles_of, plan.AttentionTpuConfig())
    for length, tiles in ((4096, (1024, 1024)), (65_536, (256, 1024))):
      sizes = layout.Sizes(1, 1, 1, length, length, 128, 2)
      with interpret.interpreted():
        self.assertEqual(choose(sizes, masks.causal(length), True), tiles)
        self.assertEqual(
            choose(sizes, masks.causal(length), False), (1024, 1024)
        )


def _compile(chip, config, shape, emits_col_mass):
  arrays = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in shape.arrays()]
  attend = _attend(config, masks.causal(shape.num_queries), emits_col_mass)
  return compile_lib.compile_for(chip, attend, *arrays)


@absltest.skipUnless(topology.has_toolchain("tpu"), "libtpu is not installed")
class CompileTest(parameterized.TestCase):

  @parameterized.product(chip=_CHIPS, col_mass=tuple(_KERNELS))
  @pytest.mark.by_default(4)
  def test_every_chip_takes(self, chip, col_mass):
    config = plan.AttentionTpuConfig(
        block_q=256, block_kv=256, col_mass=col_mass
    )
    shape = shapes.square(1024, 2, 1)
    compiled = _compile(chip, config, shape, col_mass is not None)
    self.assertLen(compiled.scoped_vmem_bytes, len(_KERNELS[col_mass]))
    for name, expected in zip(
        sorted(compiled.scoped_vmem_bytes),
        sorted(_KERNELS[col_mass]),
        strict=True,
    ):
      self.assertStartsWith(name, expected)
    # Copies of arguments and results, and rows: beyond copies not one byte for
    # each pair of a single head. budgets.json holds how much exactly.
    arrays = compiled.argument_bytes + compiled.output_bytes
    self.assertLess(compiled.temp_bytes, arrays + 1024**2)
    self.assertLess(arrays, 4 << 20)


@pytest.mark.slow
@absltest.skipUnless(topology.has_toolchain("tpu"), "libtpu is not installed")
class CompileChosenTest(parameterized.TestCase):

  @parameterized.product(chip=_CHIPS, length=(4096, 16_384, 65_536))
  def test_every_chip_takes_the_tiles_that_are_chosen(self, chip, length):
    shape = shapes.square(length, 2, 2)
    compiled = _compile(chip, None, shape, True)
    limit = compiled.chip.vmem_bytes * 15 // 16
    self.assertLess(max(compiled.scoped_vmem_bytes.values()), limit)
    arrays = compiled.argument_bytes + compiled.output_bytes
    self.assertLess(compiled.temp_bytes, arrays)


if __name__ == "__main__":
  absltest.main()
