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
from kernels_pallas.aot import chips
from kernels_pallas.aot import compile as compile_lib
from kernels_pallas.aot import topology
from kernels_pallas.decode import api
from kernels_pallas.decode import pallas_tpu
from kernels_pallas.decode import shapes
from kernels_pallas.decode import slots as slots_lib
from kernels_pallas.decode import tpu_config
from kernels_pallas.decode import tpu_int8
from kernels_pallas.decode import tpu_step
from kernels_pallas.hardware import tpu_layout
from tests.kernels_pallas import conformance
from tests.kernels_pallas.decode import layouts
from tests.kernels_pallas.decode import oracle

_MIB = 2**20


def _full(shape, dtype="float32", cache_dtype=None):
  """A step with a cache in which every slot is taken, at random."""
  rng = np.random.default_rng(0)
  normal = lambda *dims: jnp.asarray(rng.standard_normal(dims), jnp.float32)
  lead = (shape.batch, shape.num_kv_heads, shape.capacity)
  pos = rng.permuted(np.broadcast_to(np.arange(lead[2]), lead), axis=2)
  cache = vars(slots_lib.empty(*lead, shape.head_dim, cache_dtype or dtype))
  cache |= {
      "score": jnp.abs(normal(*lead)),
      "pos": jnp.asarray(pos, jnp.int32),
  }
  rows = normal(2, *lead, shape.head_dim)
  if cache_dtype == "int8":
    (cache["key"], cache["key_scale"]), (
        cache["value"],
        cache["value_scale"],
    ) = map(slots_lib.quantize, rows)
  else:
    cache["key"], cache["value"] = rows.astype(cache["key"].dtype)
  vectors = (
      normal(shape.batch, n, shape.head_dim).astype(dtype)
      for n in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
  )
  positions = jnp.full(shape.batch, lead[2], jnp.int32)
  return (*vectors, slots_lib.Slots(**cache), positions)


def _step(*arrays, chunk=None, **options):
  return api.decode_step(
      *arrays,
      implementation="pallas_tpu",
      config=pallas_tpu.Config(chunk=chunk),
      num_sinks=2,
      num_recent=9,
      **options,
  )


class ChunkTest(parameterized.TestCase):

  @pytest.mark.slow  # Two chunks against the reference: MemoryTest.
  def test_results_do_not_depend_on_the_chunk(self):
    self._check(None)

  @pytest.mark.slow
  def test_results_of_int8_do_not_depend_on_the_chunk(self):
    self._check("int8")

  def _check(self, cache_dtype):
    arrays = _full(shapes.TESTS["chunks"], cache_dtype=cache_dtype)
    with interpret.interpreted():
      one, other = (_step(*arrays, chunk=chunk) for chunk in (128, 256))
    np.testing.assert_array_equal(one[2], other[2])
    conformance.check_equal((one[0], one[1]), (other[0], other[1]), 1e-6)


class NanTest(absltest.TestCase):

  def test_a_row_of_nan_has_its_last_slot(self):
    order = jnp.array([[3.0, 1.0, 1.0], [jnp.nan] * 3])
    slot, _ = tpu_step.first_of_least(order, 3)
    np.testing.assert_array_equal(slot, [[1.0], [2.0]])

  @pytest.mark.slow
  def test_scores_that_are_nan_do_not_lead_out_of_the_cache(self):
    # The chip does not check where copies go.
    *vectors, cache, positions = _full(shapes.TESTS["mha"])
    cache = dataclasses.replace(cache, score=cache.score * jnp.nan)
    with interpret.interpreted():
      _, new, slot = _step(*vectors, cache, positions)
    np.testing.assert_array_equal(slot, cache.capacity - 1)
    self.assertTrue(jnp.isfinite(new.key).all())


class Int8Test(absltest.TestCase):

  @pytest.mark.slow  # A v4 alone; api_test has int8 by default.
  def test_registers_of_a_v4_are_read_in_their_own_order(self):
    self._check(num_heads=8)

  @pytest.mark.slow
  def test_so_they_are_where_heads_share_no_keys(self):
    self._check(num_heads=2)

  def _check(self, num_heads):
    shape = shapes.Shape(num_heads=num_heads, num_kv_heads=2, capacity=256)
    arrays = _full(shape, "bfloat16", "int8")
    chip = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion.TPU_V4, 1)
    with (
        interpret.interpreted(),
        mock.patch.object(tpu_layout, "tpu_info", return_value=chip),
        mock.patch.object(
            tpu_int8, "widened", side_effect=tpu_int8.widened
        ) as widened,
    ):
      found = jax.jit(functools.partial(_step, chunk=128))(*arrays)
    # That nothing else is tested: keys and values of two heads.
    self.assertEqual(widened.call_count, 4)
    wanted = api.decode_step(
        *arrays, num_sinks=2, num_recent=9, implementation="reference"
    )
    np.testing.assert_array_equal(found[2], wanted[2])
    atol = oracle.ATOL["bfloat16"]
    np.testing.assert_allclose(
        np.float64(found[0]), np.float64(wanted[0]), atol=atol
    )
    np.testing.assert_allclose(found[1].score, wanted[1].score, atol=atol)
    np.testing.assert_array_equal(found[1].key, wanted[1].key)


class MemoryTest(absltest.TestCase):
  """In TPU interpret mode, which finds races and reads out of bounds."""

  @pytest.mark.slow
  def test_is_used_without_races(self):
    shape = shapes.Shape(
        batch=3, num_heads=4, num_kv_heads=2, capacity=256, head_dim=16
    )
    *arrays, _ = _full(shape)
    # One of them is inactive; slots are in both chunks.
    arrays.append(jnp.array([256, -1, 300], jnp.int32))
    mode = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    try:
      with interpret.interpreted(mode):
        step = jax.jit(functools.partial(_step, chunk=128))
        found = jax.block_until_ready(step(*arrays))
        races = interpret_pallas_call.races.races_found
    finally:
      pltpu.reset_tpu_interpret_mode_state()
    self.assertFalse(races)
    expected = api.decode_step(
        *arrays, num_sinks=2, num_recent=9, implementation="reference"
    )
    np.testing.assert_array_equal(found[2], expected[2])
    conformance.check_equal(expected[:2], found[:2], oracle.ATOL["float32"])


class FitTest(parameterized.TestCase):
  """What does not fit is refused by us, with figures; chips are v5e here."""

  @parameterized.parameters(
      ({"capacity": 100}, "float32", None, "multiple of 8, .* such as 104"),
      ({"capacity": 40}, "bfloat16", None, "multiple of 16, .* such as 48"),
      ({"capacity": 512}, "float32", 384, "must divide the 512 slots"),
      ({"capacity": 512}, "float32", 64, "multiple of the 128 lanes"),
      (
          {"capacity": 1 << 20},
          "bfloat16",
          None,
          (
              "1048576 slots of 2 heads of 128, in chunks of .*, need .* MiB of"
              " VMEM: keys and values .* scores and positions 256.0 .* logits"
              " 32.0 .* has 128.0 MiB, of which .* 120.0"
          ),
      ),
      ({"capacity": 64}, "float16", None, "takes float32 and bfloat16"),
  )
  def test_says_what_would_be_right(self, sizes, dtype, chunk, message):
    shape = shapes.Shape(num_heads=4, num_kv_heads=2, **sizes)
    step = functools.partial(_step, chunk=chunk)
    with interpret.interpreted(), self.assertRaisesRegex(ValueError, message):
      jax.eval_shape(step, *shape.arrays(dtype))

  def test_a_chunk_of_nothing(self):
    with self.assertRaisesRegex(ValueError, "chunk=0 must be at least 1"):
      pallas_tpu.Config(chunk=0)


def _compile(chip, shape, dtype=jnp.bfloat16, cache_dtype=None, **options):
  step = jax.jit(functools.partial(_step, **options), donate_argnums=3)
  has_votes = options.get("score") == "votes"
  arrays = shape.arrays(dtype, cache_dtype, has_votes)
  compiled = compile_lib.compile_for(chip, step, *arrays, min_copy_bytes=1)
  cache = [x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays[3])]
  return compiled, sum(cache)


@absltest.skipUnless(topology.has_toolchain("tpu"), "libtpu is not installed")
class CompileTest(parameterized.TestCase):

  @parameterized.parameters(*chips.TPU_NAMES)
  @pytest.mark.by_default(1)
  def test_every_chip_updates_the_cache_in_place(self, chip):
    shape = shapes.BENCHMARKS["b8_c1024"]
    compiled, cache_bytes = _compile(chip, shape)
    self.assertLen(compiled.scoped_vmem_bytes, 1)
    self.assertEqual(compiled.temp_bytes, 0)
    self.assertEmpty(compiled.copies)
    self.assertEqual(compiled.alias_bytes, cache_bytes)

  @parameterized.parameters(
      {"score": "votes", "reduce": "mean", "history": 9},
      {"score": "ema", "decay": 0.0, "reduce": "layer"},
      {"score": "position"},
      {"score": "key_norm"},
  )
  @pytest.mark.slow
  def test_so_do_the_rules_of_policies(self, **options):
    shape = shapes.BENCHMARKS["b8_c1024"]
    compiled, cache_bytes = _compile("v5e", shape, **options)
    self.assertEqual(compiled.temp_bytes, 0)
    self.assertEmpty(compiled.copies)
    self.assertEqual(compiled.alias_bytes, cache_bytes)

  @pytest.mark.slow
  def test_without_donation_the_cache_is_copied(self):
    # That the test above can fail.
    arrays = shapes.BENCHMARKS["b8_c1024"].arrays()
    compiled = compile_lib.compile_for("v5e", jax.jit(_step), *arrays)
    self.assertNotEmpty(compiled.copies)


@pytest.mark.slow
@absltest.skipUnless(topology.has_toolchain("tpu"), "libtpu is not installed")
class CompileManyTest(parameterized.TestCase):

  @parameterized.product(
      chip=chips.TPU_NAMES,
      dtypes=(
          ("bfloat16", None),
          ("float32", None),
          ("bfloat16", "int8"),
          ("float32", "bfloat16"),
      ),
      sizes=(
          (1, 8, 8, 512, 128),
          (2, 32, 8, 16_384, 128),
          (3, 12, 4, 256, 64),
          (2, 32, 32, 2048, 128),
          (4, 3, 1, 96, 256),
      ),
  )
  def test_takes_less_vmem_than_we_say(self, chip, dtypes, sizes):
    batch, num_heads, num_kv_heads, capacity, head_dim = sizes
    shape = shapes.Shape(
        batch=batch,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        capacity=capacity,
        head_dim=head_dim,
    )
    options = {"score": "mean", "reduce": "max", "logits_soft_cap": 20.0}
    step = functools.partial(_step, window=99, **options)
    compiled = layouts.compile_by_row(chip, step, *shape.arrays(*dtypes))
    # XLA hands the slots out by way of VMEM; far less than scores or positions.
    self.assertLess(compiled.temp_bytes, 1 << 16)
    self.assertEmpty(compiled.copies)
    itemsizes = [jnp.dtype(dtypes[0]).itemsize] * 2
    if dtypes[1]:
      itemsizes[1] = jnp.dtype(dtypes[1]).itemsize
    sizes = tpu_config.Sizes(*sizes, *itemsizes)
    with jax.set_mesh(topology.device_mesh(compiled.chip)):
      chunk = tpu_config.choose_chunk(pallas_tpu.Config(), sizes)
    need = sum(tpu_config.vmem(chunk, sizes).values())
    (taken,) = compiled.scoped_vmem_bytes.values()
    # One MiB of ours is for registers, whatever the sizes.
    self.assertBetween(need, taken, 4 * taken + 3 * _MIB)


if __name__ == "__main__":
  absltest.main()
