import dataclasses
import functools

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
from kernels_pallas.decode import shapes
from kernels_pallas.decode import slots as slots_lib
from kernels_pallas.decode.paged import api
from kernels_pallas.decode.paged import tpu_config
from kernels_pallas.decode.paged import tpu_lanes
from tests.kernels_pallas.decode import layouts
from tests.kernels_pallas.decode import oracle

_MIB = 2**20
_NUM_UNUSED = 3


def _pool(rng, num_pages, page_size, head_dim, dtype, size):
  """Pages of random tokens, every slot taken, at positions below size."""
  normal = lambda *dims: jnp.asarray(rng.standard_normal(dims), jnp.float32)
  lead = (num_pages, page_size)
  pos = np.stack([rng.permutation(size)[:page_size] for _ in range(num_pages)])
  pool = {
      "score": jnp.abs(normal(*lead)),
      "pos": jnp.asarray(pos, jnp.int32),
  }
  rows = [normal(*lead, head_dim) for _ in range(2)]
  if dtype == "int8":
    (pool["key"], pool["key_scale"]), (
        pool["value"],
        pool["value_scale"],
    ) = map(slots_lib.quantize, rows)
  else:
    pool["key"], pool["value"] = (x.astype(dtype) for x in rows)
  return slots_lib.Slots(**pool)


def _draw(
    num_pages,
    page_size=16,
    num_groups=1,
    head_dim=8,
    dtype="float32",
    pool_dtype=None,
    positions=None,
):
  """Arguments of a step; num_pages [B, K] are those of each row."""
  rng = np.random.default_rng(0)
  num_pages = np.asarray(num_pages, np.int32)
  (batch, num_kv_heads), most = num_pages.shape, num_pages.max()
  counts = num_pages.ravel()
  total = counts.sum() + _NUM_UNUSED
  # What is past the pages of a row is not looked at.
  table = np.full((counts.size, most), 10**6, np.int32)
  table[np.arange(most) < counts[:, None]] = rng.permutation(total)[
      : counts.sum()
  ]
  size = int(most) * page_size
  pool = _pool(rng, total, page_size, head_dim, pool_dtype or dtype, size)
  vectors = (
      jnp.asarray(rng.standard_normal((batch, n, head_dim)), dtype)
      for n in (num_kv_heads * num_groups, num_kv_heads, num_kv_heads)
  )
  if positions is None:
    positions = [size] * batch
  return (
      *vectors,
      pool,
      jnp.asarray(table),
      jnp.asarray(counts),
      jnp.asarray(positions, jnp.int32),
  )


def _step(*arrays, implementation="pallas_tpu", **options):
  return api.decode_step(*arrays, implementation=implementation, **options)


def _check(arrays, mode=True, **options):
  """Slots and what is stored exactly, out and scores to rounding."""
  wanted = _step(*arrays, implementation="reference", **options)
  with interpret.interpreted(mode):
    found = jax.jit(functools.partial(_step, **options))(*arrays)
  np.testing.assert_array_equal(found[2], wanted[2])
  query, value = arrays[0], arrays[2]
  largest = max(1.0, float(jnp.abs(value).max()))
  wide = lambda x: np.asarray(x, np.float64)
  np.testing.assert_allclose(
      wide(found[0]),
      wide(wanted[0]),
      atol=oracle.ATOL[query.dtype.name] * largest,
      rtol=0,
  )
  # Products of bfloat16 have one rounding of weights and no other.
  atol = oracle.ATOL[query.dtype.name]
  np.testing.assert_allclose(
      found[1].score, wanted[1].score, atol=atol, rtol=1e-5
  )
  for name in ("key", "value", "pos", "key_scale", "value_scale"):
    one, other = (getattr(x[1], name) for x in (found, wanted))
    if one is not None:
      np.testing.assert_array_equal(wide(one), wide(other), err_msg=name)


class EqualsReferenceTest(parameterized.TestCase):

  @pytest.mark.slow  # One of those below; api_test has pages by default.
  def test_slots_exactly(self):
    self._check("page", 4, "bfloat16", "int8")

  @parameterized.product(
      granularity=("token", "page"),
      num_groups=(1, 4),
      dtypes=(
          ("float32", None),
          ("bfloat16", None),
          ("bfloat16", "int8"),
          ("float32", "int8"),
          ("float32", "bfloat16"),
      ),
  )
  @pytest.mark.slow
  def test_slots_exactly_for_all(self, granularity, num_groups, dtypes):
    self._check(granularity, num_groups, *dtypes)

  def _check(self, granularity, num_groups, dtype, pool_dtype):
    page_size = 32 if pool_dtype == "int8" else 16
    arrays = _draw(
        [[3, 1], [2, 3]],
        page_size,
        num_groups,
        dtype=dtype,
        pool_dtype=pool_dtype,
        positions=[500, 600],
    )
    _check(arrays, granularity=granularity, num_sinks=1, num_recent=3)

  @parameterized.parameters(
      {"score": "mean", "reduce": "max", "logits_soft_cap": 3.0},
      {"score": "ema", "decay": 0.9, "window": 40, "scale": -0.3},
  )
  @pytest.mark.slow
  def test_options(self, **options):
    # Several blocks of pages that fill lanes, and one that is not whole.
    arrays = _draw([[11, 1], [9, 8]], 128, num_groups=2, positions=[1408, -1])
    for granularity in ("token", "page"):
      _check(arrays, granularity=granularity, num_recent=9, **options)

  @pytest.mark.slow
  def test_many_small_pages(self):
    _check(_draw([[70, 64, 9]], num_groups=2), granularity="page")

  @pytest.mark.slow
  def test_where_every_page_has_a_protected_token_one_token_goes(self):
    arrays = list(_draw([[2, 2]]))
    pos = arrays[3].pos.at[:, 5].set(31)
    arrays[3] = dataclasses.replace(arrays[3], pos=pos)
    _check(tuple(arrays), granularity="page", num_recent=1)

  @pytest.mark.slow
  def test_inactive_sequences_stay_as_they_are(self):
    arrays = _draw([[2, 1], [1, 2]], positions=[-1, -1])
    with interpret.interpreted():
      out, pool, slot = _step(*arrays)
    np.testing.assert_array_equal(out, 0)
    np.testing.assert_array_equal(slot, -1)
    jax.tree.map(np.testing.assert_array_equal, pool, arrays[3])

  @pytest.mark.slow
  def test_scores_that_are_nan_do_not_lead_out_of_the_pages(self):
    # The chip does not check where copies go.
    arrays = list(_draw([[3, 1]]))
    arrays[3] = dataclasses.replace(arrays[3], score=arrays[3].score * jnp.nan)
    with interpret.interpreted():
      _, pool, slot = _step(*arrays)
    np.testing.assert_array_equal(slot, [[47, 15]])
    unused = np.setdiff1d(np.arange(len(pool.pos)), arrays[4])
    np.testing.assert_array_equal(pool.key[unused], arrays[3].key[unused])


class LanesTest(parameterized.TestCase):

  @parameterized.parameters((8, 16), (24, 32), (8, 64), (16, 128), (8, 256))
  @pytest.mark.by_default(1)
  def test_rows_and_pages(self, num, size):
    pages = jnp.arange(num * size, dtype=jnp.int32).reshape(num, size)
    row = tpu_lanes.to_row(pages)
    np.testing.assert_array_equal(row, pages.reshape(1, -1))
    np.testing.assert_array_equal(tpu_lanes.to_pages(row, size), pages)


class MemoryTest(absltest.TestCase):
  """In TPU interpret mode, which finds races and reads out of bounds."""

  @pytest.mark.slow
  def test_is_used_without_races(self):
    arrays = _draw([[3, 2], [1, 1], [2, 3]], positions=[48, -1, 50])
    self._check(arrays)

  @pytest.mark.slow
  def test_is_used_without_races_by_more_blocks(self):
    self._check(_draw([[10, 3], [9, 1]], 128, positions=[1500, 5000]))

  def _check(self, arrays):
    mode = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    try:
      _check(arrays, mode, granularity="page", num_recent=3)
      self.assertFalse(interpret_pallas_call.races.races_found)
    finally:
      pltpu.reset_tpu_interpret_mode_state()


def _abstract(
    batch=4,
    num_heads=32,
    num_kv_heads=8,
    most_pages=16,
    page_size=64,
    head_dim=128,
    dtype="bfloat16",
    pool_dtype=None,
):
  """Abstract arguments; a row has `most_pages`."""
  num_rows = batch * num_kv_heads
  total = num_rows * most_pages
  pages = shapes.Shape(
      num_heads=total,
      num_kv_heads=total,
      capacity=page_size,
      head_dim=head_dim,
  ).arrays(dtype, pool_dtype)[3]
  vectors = (
      jax.ShapeDtypeStruct((batch, n, head_dim), dtype)
      for n in (num_heads, num_kv_heads, num_kv_heads)
  )
  integers = ((num_rows, most_pages), (num_rows,), (batch,))
  return (
      *vectors,
      jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), pages),
      *(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in integers),
  )


class FitTest(parameterized.TestCase):
  """What does not fit is refused by us, with figures; chips are v5e here."""

  @parameterized.parameters(
      ({"page_size": 24}, "pages of 24 slots: .* 16 bits .* 16, 32, 64, 128"),
      (
          {"page_size": 16, "pool_dtype": "int8"},
          "pages of 16 slots: .* 8 bits a TPU takes pages of 32, 64, 128 slots",
      ),
      ({"page_size": 192}, "or a multiple of 128"),
      ({"dtype": "float16"}, "takes float32 and bfloat16"),
      (
          {"batch": 64, "most_pages": 1024},
          (
              "tables of 512 rows of 1024 pages need .* KiB of scalar memory:"
              " page_table 2048.0 .* has 1024.0 KiB, of which .* 992.0"
          ),
      ),
      (
          {"batch": 1, "most_pages": 16_384},
          (
              "16384 pages of 64 slots of 8 heads of 128 need .* MiB of VMEM:"
              " keys and values 1.0 .* scores and positions 128.0 .* 120.0"
          ),
      ),
  )
  def test_says_what_would_be_right(self, sizes, message):
    with interpret.interpreted(), self.assertRaisesRegex(ValueError, message):
      jax.eval_shape(_step, *_abstract(**sizes))


def _compile(chip, arrays, **options):
  step = jax.jit(functools.partial(_step, **options), donate_argnums=3)
  compiled = compile_lib.compile_for(chip, step, *arrays, min_copy_bytes=1)
  pool = [x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays[3])]
  return compiled, sum(pool)


@absltest.skipUnless(topology.has_toolchain("tpu"), "libtpu is not installed")
class CompileTest(parameterized.TestCase):

  # Of v5p and v7x XLA turns arrays around whose rows are less than 128 lanes.
  @parameterized.parameters(
      *((chip, 128, 128) for chip in chips.TPU_NAMES),
      ("v4", 16, 64),
      ("v5e", 16, 64),
      ("v6e", 16, 64),
  )
  @pytest.mark.by_default(1)
  def test_every_chip_updates_the_pool_in_place(self, chip, most, page_size):
    arrays = _abstract(most_pages=most, page_size=page_size)
    compiled, pool_bytes = _compile(chip, arrays)
    self.assertLen(compiled.scoped_vmem_bytes, 1)
    self.assertEqual(compiled.temp_bytes, 0)
    self.assertEmpty(compiled.copies)
    self.assertEqual(compiled.alias_bytes, pool_bytes)

  @parameterized.parameters("v5p", "v7x")
  @pytest.mark.slow
  def test_smaller_pages_stay_in_place_where_jit_is_told_how_they_lie(
      self, chip
  ):
    arrays = _abstract()
    compiled = layouts.compile_by_row(chip, _step, *arrays)
    self.assertEqual(compiled.temp_bytes, 0)
    self.assertEmpty(compiled.copies)

  @pytest.mark.slow
  def test_without_donation_the_pool_is_copied(self):
    # That the test above can fail. More than would fit VMEM.
    arrays = _abstract(batch=64)
    compiled = compile_lib.compile_for("v5e", jax.jit(_step), *arrays)
    self.assertNotEmpty(compiled.copies)

  def test_none_is_this_kernel_on_a_tpu(self):
    compiled, _ = _compile("v5e", _abstract(), implementation=None)
    (name,) = compiled.scoped_vmem_bytes
    self.assertStartsWith(name, "heavy_hitter_decode_paged")

  @parameterized.parameters(("v5e", 240), ("v6e", 240))
  @pytest.mark.slow
  def test_tables_that_we_allow_fit(self, chip, batch):
    # 960 KiB of table.
    arrays = _abstract(batch=batch, most_pages=128, page_size=16)
    _compile(chip, arrays)


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
          (4, 8, 8, 128, 128, 128),
          (2, 32, 8, 256, 64, 128),
          (3, 12, 4, 9, 32, 64),
          (1, 3, 1, 5, 256, 256),
      ),
      granularity=("token", "page"),
  )
  def test_takes_less_vmem_than_we_say(self, chip, dtypes, sizes, granularity):
    names = (
        "batch",
        "num_heads",
        "num_kv_heads",
        "most_pages",
        "page_size",
        "head_dim",
    )
    arrays = _abstract(
        **dict(zip(names, sizes, strict=True)),
        dtype=dtypes[0],
        pool_dtype=dtypes[1],
    )
    options = {"score": "mean", "reduce": "max", "logits_soft_cap": 20.0}
    step = functools.partial(
        _step, window=99, granularity=granularity, **options
    )
    compiled = layouts.compile_by_row(chip, step, *arrays)
    # XLA hands the slots out by way of VMEM; far less than scores or positions.
    self.assertLess(compiled.temp_bytes, 1 << 16)
    self.assertEmpty(compiled.copies)
    (taken,) = compiled.scoped_vmem_bytes.values()
    sizes = tpu_config.sizes_of(arrays[0], arrays[3], arrays[4])
    need = sum(tpu_config.vmem(sizes).values())
    # One MiB of ours is for registers, whatever the sizes.
    self.assertBetween(need, taken, 4 * taken + 3 * _MIB)


if __name__ == "__main__":
  absltest.main()
