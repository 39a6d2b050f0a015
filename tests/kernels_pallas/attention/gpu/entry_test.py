import functools
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
from kernels_pallas.attention.gpu import entry
from kernels_pallas.attention.gpu import forward
from kernels_pallas.attention.gpu import plan
from kernels_pallas.attention.gpu import task as task_lib
from kernels_pallas.hardware import gpu_layout
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

  @pytest.mark.slow
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

  @pytest.mark.slow
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

  @pytest.mark.slow
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
