import functools
import inspect
import shutil

from absl.testing import parameterized
import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import interpret
from kernels_pallas import masks
from kernels_pallas import selection as selection_lib
from kernels_pallas.aot import jobs
from kernels_pallas.aot import ptx
from kernels_pallas.aot import topology
from kernels_pallas.attention import api
from kernels_pallas.attention import differentiable
from kernels_pallas.attention import reference
from kernels_pallas.attention import shapes
from kernels_pallas.attention.gpu import backward_kv
from kernels_pallas.attention.gpu import backward_q
from kernels_pallas.attention.gpu import col_mass
from kernels_pallas.attention.gpu import cudnn as cudnn_lib
from kernels_pallas.attention.gpu import entry
from kernels_pallas.attention.gpu import forward
from kernels_pallas.attention.gpu import plan
from kernels_pallas.attention.gpu import task as task_lib
from kernels_pallas.hardware import gpu_layout
from kernels_pallas.hardware import gpu_math
from tests.kernels_pallas import conformance

_KERNELS = (forward, col_mass, backward_kv, backward_q)
# Two hundred roundings of float32 numbers of order 1.
_ATOL = 2e-5

needs_new_jax = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="Mosaic GPU kernels need jax >= 0.11"
)
needs_compiler = pytest.mark.skipif(
    not topology.has_toolchain("cuda") or shutil.which("ptxas") is None,
    reason="compiling for the H100 needs jax >= 0.11, jax-cuda13-plugin, ptxas",
)


class ArithmeticTest(parameterized.TestCase):
  """The functions of a tile against float64, without a kernel."""

  def test_predicate_is_the_mask(self):
    ids = np.arange(48) % 5
    mask = masks.streaming(48, window=9, num_sinks=3) & masks.hash_sparse(
        ids, ids[::-1].copy()
    )
    keys = np.broadcast_to(np.arange(48), (48, 48))
    spans = [(mask.starts[i][:, None], mask.stops[i][:, None]) for i in (0, 1)]
    found = gpu_math.is_allowed(
        keys, spans, mask.query_ids[:, None], mask.key_ids[None]
    )
    np.testing.assert_array_equal(found, masks.allowed(mask, 48))

  def test_online_softmax_in_pieces_is_softmax(self):
    rng = np.random.default_rng(0)
    logits = 4 * rng.standard_normal((8, 96))
    logits[0, :32] = -np.inf  # A row that has no key in the first piece,
    logits[1] = -np.inf  # and one that never has any.
    highest, total = jnp.full((8,), -1e30), jnp.zeros((8,))
    summed = jnp.zeros((8, 96))
    for i in range(3):
      piece = jnp.asarray(logits[:, 32 * i : 32 * i + 32], jnp.float32)
      weights, correction, highest, total = gpu_math.online_softmax(
          piece, highest, total
      )
      summed = summed * correction[:, None]
      summed = summed.at[:, 32 * i : 32 * i + 32].set(weights)
    expected = np.exp2(logits - np.where(np.arange(8) == 1, 0, 20)[:, None])
    expected /= np.maximum(expected.sum(axis=1, keepdims=True), 1e-300)
    found = summed / jnp.where(total > 0, total, 1)[:, None]
    np.testing.assert_allclose(found, expected, atol=_ATOL)
    assert total[1] == 0

  @parameterized.parameters(None, 3.0)
  def test_gradient_of_a_tile(self, soft_cap):
    rng = np.random.default_rng(1)
    products, d_weights = rng.standard_normal((2, 8, 16))
    scale = 0.7

    def weights_of(products):
      logits = gpu_math.log2_logits(products, scale, soft_cap)
      lse = jax.nn.logsumexp(logits * np.log(2), axis=1) * gpu_math.LOG2_E
      return gpu_math.weights_of(logits, lse, axis=0)

    with jax.enable_x64(True):
      wide = jnp.asarray(products)
      expected = jax.vjp(weights_of, wide)[1](jnp.asarray(d_weights))[0]
      logits = scale * products
      if soft_cap is not None:
        logits = soft_cap * np.tanh(logits / soft_cap)
      exact = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    narrow = jnp.asarray(products, jnp.float32)
    weights = weights_of(narrow)
    np.testing.assert_allclose(weights, exact, atol=_ATOL)
    logits = gpu_math.log2_logits(narrow, scale, soft_cap)
    slopes = gpu_math.with_cap_slope(weights, logits, soft_cap)
    masked = gpu_math.with_cap_slope(
        0 * weights, 0 * logits - jnp.inf, soft_cap
    )
    np.testing.assert_array_equal(masked, 0)
    delta = jnp.asarray((exact * d_weights).sum(axis=1), jnp.float32)
    for axis in (0, 1):
      turn = (lambda x: x) if axis == 0 else jnp.transpose
      found = gpu_math.d_products(
          turn(slopes), turn(jnp.asarray(d_weights, jnp.float32)), delta, axis
      )
      np.testing.assert_allclose(
          scale * turn(found), expected, atol=_ATOL, err_msg=f"axis {axis}"
      )


class ConfigTest(parameterized.TestCase):

  @parameterized.product(
      head_dim=(64, 128), most=(64, 128, 192, 512), has_ids=(False, True)
  )
  def test_chosen_tiles_divide_blocks_and_fit(self, head_dim, most, has_ids):
    for kernel in _KERNELS:
      limits = task_lib.Limits(head_dim, has_ids, most, most)
      tiles = kernel.choose(limits)
      assert most % tiles.block_q == 0 and most % tiles.block_kv == 0
      gpu_layout.check_smem("", kernel.smem_bytes(tiles, head_dim), tiles)

  def test_too_much_shared_memory_is_refused_with_the_numbers(self):
    tiles = gpu_layout.TileConfig(num_stages=4)
    with pytest.raises(ValueError, match="295424 bytes .* a block has 232448"):
      gpu_layout.check_smem("forward", forward.smem_bytes(tiles, 128), tiles)

  @parameterized.parameters(
      ("block_q", 96, "must be 64 or 128"), ("num_stages", 0, "at least 1")
  )
  def test_bad_tiles_are_refused(self, name, value, message):
    with pytest.raises(ValueError, match=f"{name}={value}.*{message}"):
      gpu_layout.TileConfig(**{name: value})

  def test_smaller_blocks_select_the_same(self):
    rng = np.random.default_rng(2)
    table = np.argsort(rng.random((1, 2, 3, 4)), axis=-1)[..., :2]
    selection = selection_lib.Selection(
        table.astype(np.int32),
        rng.integers(0, 3, (1, 2, 3)).astype(np.int32),
        masks.causal(600, 900),
        256,
        256,
    )
    found = plan.refine(selection, 600, 128, 64)
    assert found.block_table.shape == (1, 2, 5, 8)
    pairs = [reference.allowed_pairs(s, 600, 900) for s in (selection, found)]
    np.testing.assert_array_equal(*pairs)


@needs_new_jax
class SupportTest(parameterized.TestCase):

  @parameterized.parameters(
      (jnp.float32, 64, "bfloat16 and float16, not float32"),
      (jnp.bfloat16, 192, "heads of up to 128, not of 192"),
  )
  def test_what_the_kernels_lack_is_refused(self, dtype, head_dim, reason):
    query = jnp.ones((1, 8, 1, head_dim), dtype)
    assert reason in entry.why_not(query)
    with interpret.interpreted(), pytest.raises(ValueError, match=reason):
      api.attention(query, query, query, implementation="pallas_gpu")

  def test_blocks_of_a_selection_must_be_tiles(self):
    query = jnp.ones((1, 64, 1, 64), jnp.bfloat16)
    selection = selection_lib.from_mask(
        masks.causal(64), 64, 64, block_q=32, block_kv=64
    )
    with interpret.interpreted(), pytest.raises(ValueError, match="block_q"):
      api.attention(
          query, query, query, where=selection, implementation="pallas_gpu"
      )

  def test_a_cpu_is_no_hopper(self):
    query = jnp.ones((1, 8, 1, 64), jnp.bfloat16)
    assert "Hopper" in entry.why_not(query)
    assert entry.why_not(query, any_device=True) is None

  def test_old_jax_is_refused_by_name(self):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(jax, "__version_info__", (0, 10, 2))
      with pytest.raises(ImportError, match="pallas_gpu needs jax >= 0.11"):
        gpu_layout.require_jax()


class CudnnTest(parameterized.TestCase):
  """cuDNN itself runs on a GPU alone; here, what it would be told."""

  @parameterized.parameters(
      (None, {"is_causal": False, "window": None}),
      (masks.full(8, 8), {"is_causal": False, "window": None}),
      (masks.causal(8), {"is_causal": True, "window": None}),
      (masks.sliding_window(8, window=3), {"is_causal": True, "window": 3}),
  )
  def test_masks_that_it_has(self, mask, expected):
    assert self._options(mask) == expected

  @parameterized.parameters(
      (masks.sliding_window(8, window=3, is_causal=False), "causal window"),
      (masks.causal(8, offset=1), "causal window"),
      (masks.streaming(8, window=3, num_sinks=1), "one span"),
      (masks.hash_sparse(np.arange(8), np.arange(8)), "no ids"),
      (masks.document(np.array([0, 0, 0, 1, 1, 1, 1, 1])), "causal window"),
  )
  def test_masks_that_it_lacks(self, mask, reason):
    assert reason in self._options(mask)

  def test_it_is_never_replaced_silently(self):
    query = jnp.ones((1, 8, 1, 64), jnp.bfloat16)
    config = entry.Config(forward_by="cudnn")
    spec = differentiable.AttentionSpec(
        scale=1.0, logits_soft_cap=2.0, config=config
    )
    with pytest.raises(ValueError, match="cuDNN has no sink logits"):
      entry.forward(_inputs(query, query, query), spec)

  @needs_new_jax
  def test_it_is_told_all_and_gives_the_lse_of_the_column_sums(self):
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    signature = inspect.signature(cudnn.dot_product_attention)
    mask = masks.sliding_window(96, window=40)
    rng = np.random.default_rng(4)
    query, key, value = (
        jnp.asarray(rng.standard_normal((1, 96, 1, 64)), jnp.bfloat16)
        for _ in range(3)
    )

    def stand_in(*args, **kwargs):
      told = signature.bind(*args, **kwargs).arguments
      assert told["mask_type"] == cudnn.MaskType.CAUSAL
      assert told["sliding_window_length"] == 40 and told["return_residual"]
      result = api.attention(
          *args,
          where=mask,
          scale=told["scale"],
          return_lse=True,
          implementation="reference",
      )
      return result.out, result.lse

    call = functools.partial(
        api.attention,
        query,
        key,
        value,
        where=mask,
        scale=0.3,
        return_lse=True,
        return_col_mass=True,
    )
    config = entry.Config(forward_by="cudnn")
    expected = call(implementation="reference")
    with pytest.MonkeyPatch.context() as patch, interpret.interpreted():
      patch.setattr(cudnn, "dot_product_attention", stand_in)
      found = call(implementation="pallas_gpu", config=config)
    np.testing.assert_array_equal(found.out, expected.out)
    np.testing.assert_array_equal(found.lse, expected.lse)
    np.testing.assert_allclose(found.col_mass, expected.col_mass, atol=_ATOL)

  def _options(self, mask):
    query = jnp.ones((1, 8, 1, 64), jnp.bfloat16)
    spec = differentiable.AttentionSpec(scale=1.0)
    return cudnn_lib.options_of(_inputs(query, query, query, mask), spec)


def _inputs(query, key, value, where=None):
  return differentiable.Inputs(query, key, value, where, None, None)


def _small(num_queries, num_keys, num_heads, head_dim=64):
  return shapes.Shape(
      num_queries=num_queries,
      num_keys=num_keys,
      num_heads=num_heads,
      num_kv_heads=1,
      head_dim=head_dim,
  )


@needs_new_jax
class InterpretedTest(parameterized.TestCase):
  """The kernels' own code on a CPU: values, gradients, and determinism."""

  def test_causal_gqa_with_sinks_and_row_weights(self):
    mask = masks.causal(70, 130, offset=60)
    self._check(
        _small(70, 130, 2),
        functools.partial(api.attention, where=mask),
        masks.allowed(mask, 130),
        conformance.Options(has_sinks=True, has_row_weights=True),
    )

  def test_selection_with_soft_cap_ids_and_rows_without_keys(self):
    ids = np.arange(130) % 3
    mask = masks.streaming(130, window=40, num_sinks=3) & masks.hash_sparse(
        ids, ids[::-1].copy()
    )
    table = np.array([[[[0, 0], [1, 0], [2, 0]]]], np.int32)
    selection = selection_lib.Selection(
        table, np.array([[[1, 2, 1]]], np.int32), mask, 64, 64
    )
    self._check(
        _small(130, 130, 1),
        functools.partial(api.attention, where=selection),
        reference.allowed_pairs(selection, 130, 130),
        conformance.Options(soft_cap=2.0, scale=-0.2),
    )

  def test_copies_do_not_race_with_reads(self):
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    rng = np.random.default_rng(3)
    query, key, value, d_out = (
        jnp.asarray(rng.standard_normal((1, 192, 1, 64)), jnp.bfloat16)
        for _ in range(4)
    )
    # Rings that are filled more than once, and two warpgroups that take turns.
    streams_keys = gpu_layout.TileConfig(block_q=128, block_kv=64, num_stages=2)
    streams_queries = gpu_layout.TileConfig(
        block_q=64, block_kv=128, num_stages=2
    )
    tiles = plan.Tiles(
        forward=streams_keys,
        backward_q=streams_keys,
        col_mass=streams_queries,
        backward_kv=streams_queries,
    )
    config = entry.Config(tiles=tiles)
    spec = differentiable.AttentionSpec(scale=0.1, config=config)
    lse = delta = jnp.ones((1, 1, 192))
    inputs = _inputs(query, key, value)
    saved = differentiable.Saved(query, key, value, None, lse, delta, d_out)
    calls = (
        lambda: entry.softmax_of(inputs, spec),
        lambda: entry.col_mass(inputs._replace(row_weights=delta), lse, spec),
        lambda: entry.backward(saved, spec),
    )
    with interpret.interpreted(plgpu.InterpretGPUParams(detect_races=True)):
      for call in calls:
        jax.block_until_ready(call())
        assert not gpu_callbacks.get_races().races_found

  def _check(self, shape, call, allowed, options):
    allowed = np.asarray(allowed)
    allowed = allowed.reshape((1,) * (4 - allowed.ndim) + allowed.shape)
    inputs = conformance.draw(shape, "bfloat16", allowed, options)
    call = functools.partial(call, implementation="pallas_gpu")
    # Tracing anew, as `check` may for its second call, needs the mode too.
    with interpret.interpreted():
      conformance.check(call, inputs, "pallas_gpu")


def causal_program(head_dim, num_kv_heads):
  """A training step of causal attention, for `aot`."""
  shape = shapes.square(2048, 4, num_kv_heads, head_dim)
  call = functools.partial(api.attention, where=masks.causal(2048))
  return _gradients(call), shape.arrays()


def selection_program(dtype):
  """A training step of block-sparse attention with a traced table."""
  shape = shapes.square(2000, 4, 2, 80)

  def call(query, key, value, table, num_valid, **keywords):
    ids = jnp.arange(2000) % 7
    mask = masks.hash_sparse(ids, ids) & masks.streaming(
        2000, window=300, num_sinks=4
    )
    selection = selection_lib.Selection(table, num_valid, mask, 256, 256)
    return api.attention(
        query, key, value, where=selection, logits_soft_cap=30.0, **keywords
    )

  table = jax.ShapeDtypeStruct((1, 4, 8, 3), jnp.int32)
  num_valid = jax.ShapeDtypeStruct((1, 4, 8), jnp.int32)
  return _gradients(call), (*shape.arrays(dtype), table, num_valid)


def _gradients(call):
  def run(query, key, value, *rest):
    def loss(query, key, value):
      result = call(
          query,
          key,
          value,
          *rest,
          return_lse=True,
          return_col_mass=True,
          implementation="pallas_gpu",
      )
      out = result.out.astype(jnp.float32).sum()
      return out + result.lse.sum(), result.col_mass

    return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(query, key, value)

  return run


@needs_compiler
class CompiledTest(parameterized.TestCase):

  def test_kernels_compile_for_the_h100_without_spills(self):
    self._check("causal_program", {"head_dim": 128, "num_kv_heads": 1})

  @pytest.mark.slow
  def test_traced_selections_compile_without_spills(self):
    self._check("selection_program", {"dtype": "float16"})

  def _check(self, program, kwargs):
    program = f"tests.kernels_pallas.attention.gpu.entry_test:{program}"
    (report,) = ptx.report([jobs.Job("h100", program, kwargs)])
    # forward, col_mass, backward_q and backward_kv.
    assert len(report.kernels) == 4
    for kernel in report.kernels:
      assert kernel.spill_store_bytes == kernel.spill_load_bytes == 0, kernel
      assert kernel.smem_bytes <= gpu_layout.MAX_SMEM_BYTES
      # 168 for each of 384 threads, until `setmaxnreg` hands out 240 and 24.
      assert kernel.registers <= 168
      assert kernel.num_wgmma and kernel.num_tma_loads, kernel
