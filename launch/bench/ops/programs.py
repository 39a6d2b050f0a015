"""Programs that `launch.bench.kernels` compiles: ours and jax's own kernels.

Each function returns (fn, abstract arguments). Of attention: causal heads that
share nothing, bfloat16, of head size 128, which is how schedules are compared.
A chip whose two cores work as one gets two heads, one a core.
"""

import functools
import math
from typing import Any

import jax
from jax.experimental.pallas.ops.tpu import flash_attention as jax_flash
from jax.experimental.pallas.ops.tpu import paged_attention as jax_paged
from jax.experimental.pallas.ops.tpu import splash_attention as jax_splash
import jax.numpy as jnp
import numpy as np

from kernels_pallas import masks
from kernels_pallas import selection as selection_lib
from kernels_pallas.attention import api
from kernels_pallas.attention.tpu import plan
from kernels_pallas.decode import api as decode_api
from kernels_pallas.decode import shapes as decode_shapes
from kernels_pallas.decode.paged import api as decode_paged_api
from kernels_pallas.gather_mlp import api as gather_api
from kernels_pallas.gather_mlp import shapes as gather_shapes
from kernels_pallas.linear_attention import api as linear_api
from kernels_pallas.linear_attention import pallas_tpu as linear_tpu
from kernels_pallas.linear_attention import sweep as sweep_lib

HEAD_DIM = 128


def forward(
    length: int,
    block: int | None = None,
    num_heads: int = 1,
    return_col_mass: bool = False,
    col_mass: Any = None,
    is_causal: bool = True,
) -> tuple[Any, Any]:
  """Ours, with or without exact column sums, made as `col_mass` says."""
  config = plan.AttentionTpuConfig(
      block_q=block, block_kv=block, col_mass=col_mass
  )

  def attend(*arrays):
    result = api.attention(
        *arrays,
        where=masks.causal(length) if is_causal else None,
        return_col_mass=return_col_mass,
        implementation="pallas_tpu",
        config=config,
    )
    return (result.out, result.col_mass) if return_col_mass else result.out

  return attend, (_heads_last(length, num_heads),) * 3


def backward(
    length: int, block: int | None = None, num_heads: int = 1
) -> tuple[Any, Any]:
  """Ours: forward and backward; the latter is the last kernel."""
  attend, arrays = forward(length, block, num_heads)
  return _with_backward(attend), (*arrays, arrays[0])


def sparse(
    length: int,
    block_q: int,
    block_kv: int,
    density: float,
    num_heads: int = 1,
    is_backward: bool = False,
) -> tuple[Any, Any]:
  """Ours under a random selection that is known; see `random_selection`."""
  selection = random_selection(length, num_heads, block_q, block_kv, density)

  def attend(*arrays):
    return api.attention(
        *arrays, where=selection, implementation="pallas_tpu"
    ).out

  array = _heads_last(length, num_heads)
  if is_backward:
    return _with_backward(attend), (array,) * 4
  return attend, (array,) * 3


def random_selection(
    length: int, num_heads: int, block_q: int, block_kv: int, density: float
) -> selection_lib.Selection:
  """Some of the causal blocks of each row and head, those of its own always.

  Args:
    length: T and S.
    num_heads: Each draws its own blocks.
    block_q: Queries in a block.
    block_kv: Keys in a block.
    density: Share of the blocks that a causal mask touches.
  """
  mask = masks.causal(length)
  states = selection_lib.tile_states(mask, length, length, block_q, block_kv)
  shape = (1, num_heads, *states.shape)
  is_own = np.broadcast_to(states == selection_lib.PARTIAL, shape)
  is_causal = np.broadcast_to(states > selection_lib.EMPTY, shape)
  order = np.random.default_rng(0).random(shape) - is_own + 2.0 * ~is_causal
  share = np.ceil(density * is_causal.sum(axis=-1)).astype(np.int32)
  num_valid = np.maximum(share, is_own.sum(axis=-1)).astype(np.int32)
  width = int(num_valid.max())
  table = np.argsort(order, axis=-1)[..., :width].astype(np.int32)
  return selection_lib.Selection(table, num_valid, mask, block_q, block_kv)


def linear(
    length: int,
    num_heads: int = 1,
    chunk: int | None = None,
    is_reversed: bool = False,
) -> tuple[Any, Any]:
  """Our linear attention with a decay of 0.99, or one of its backward sweeps.

  The backward pass is a forward sweep and two reversed ones.
  """
  config = linear_tpu.Config(chunk=chunk)
  array = _heads_last(length, num_heads)
  if not is_reversed:

    def attend(*arrays):
      return linear_api.linear_attention(
          *arrays,
          decay=jnp.full(num_heads, 0.99),
          implementation="pallas_tpu",
          config=config,
      ).out

    return attend, (array,) * 3

  def sweep(query, key, value):
    log_decay = jnp.full(num_heads, math.log(0.99))
    state = jnp.zeros((1, num_heads, HEAD_DIM, HEAD_DIM))
    options = sweep_lib.Sweep(is_reversed=True, config=config)
    operands = sweep_lib.Operands(query, key, value, log_decay, state)
    return linear_tpu.run(operands, options)[0]

  return sweep, (array,) * 3


def gather_mlp(
    shape: str, density: float, is_backward: bool = False
) -> tuple[Any, Any]:
  """Ours over random blocks that are known, the same for all sequences.

  Args:
    shape: A name in `gather_mlp.shapes.BENCHMARKS`.
    density: Share of the blocks, rounded.
    is_backward: Whether to return the gradients instead.
  """
  sizes = gather_shapes.BENCHMARKS[shape]
  x, weights = sizes.arrays()
  order = np.random.default_rng(0).permutation(sizes.num_blocks)
  chosen = np.sort(order[: round(density * sizes.num_blocks)])
  given = {k: v for k, v in weights._asdict().items() if v is not None}

  def apply(x, given):
    return gather_api.gather_mlp(
        x,
        **given,
        block_ids=chosen.astype(np.int32),
        activation="silu" if sizes.is_gated else "relu",
        implementation="pallas_tpu",
    )

  if is_backward:
    both = lambda x, given, d_out: jax.vjp(apply, x, given)[1](d_out)
    return both, (x, given, x)
  return apply, (x, given)


def dense_mlp(shape: str) -> tuple[Any, Any]:
  """The MLP of all neurons by XLA, products of bfloat16 with float32 sums."""
  sizes = gather_shapes.BENCHMARKS[shape]

  def apply(x, weights):
    multiply = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    hidden = multiply("BD,FD->BF", x, weights.up)
    if weights.up_bias is not None:
      hidden += weights.up_bias[None]
    if weights.gate is None:
      hidden = jax.nn.relu(hidden)
    else:
      gate = multiply("BD,FD->BF", x, weights.gate)
      hidden *= jax.nn.silu(gate)
    return multiply("BF,FD->BD", hidden.astype(x.dtype), weights.down)

  return apply, sizes.arrays()


def flash(length: int, block: int, num_heads: int = 1) -> tuple[Any, Any]:
  """Flash attention of jax."""
  sizes = jax_flash.BlockSizes(
      block_q=block, block_k_major=block, block_k=block, block_b=1
  )
  attend = functools.partial(
      jax_flash.flash_attention, causal=True, block_sizes=sizes
  )
  shape = (1, num_heads, length, HEAD_DIM)
  return attend, (jax.ShapeDtypeStruct(shape, jnp.bfloat16),) * 3


def splash(
    length: int, block: int, num_heads: int = 1, is_backward: bool = False
) -> tuple[Any, Any]:
  """Splash attention of jax, with its fused backward kernel."""
  names = ["block_q", "block_kv", "block_kv_compute"]
  if is_backward:
    names += ["block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"]
  blocks: Any = dict.fromkeys(names, block)
  sizes = jax_splash.BlockSizes(**blocks, use_fused_bwd_kernel=is_backward)
  causal = jax_splash.CausalMask((length, length))
  mask = jax_splash.MultiHeadMask([causal] * num_heads)
  kernel = jax_splash.make_splash_mha_single_device(mask, block_sizes=sizes)
  attend = lambda *arrays: kernel(*arrays)
  array = jax.ShapeDtypeStruct((num_heads, length, HEAD_DIM), jnp.bfloat16)
  if is_backward:
    return _with_backward(attend), (array,) * 4
  return attend, (array,) * 3


def decode(
    batch: int, capacity: int, cache_dtype: str | None = None
) -> tuple[Any, Any]:
  """Ours: a step of 32 query and 8 key heads, with eviction, in place."""
  shape = decode_shapes.Shape(
      batch=batch, num_heads=32, num_kv_heads=8, capacity=capacity
  )
  # Known, so that it is known too which sequences are active.
  positions = np.full(batch, 1 << 20, np.int32)

  def step(query, key, value, cache):
    return decode_api.decode_step(
        query,
        key,
        value,
        cache,
        jnp.asarray(positions),
        num_sinks=4,
        num_recent=capacity // 2,
        implementation="pallas_tpu",
    )

  arrays = shape.arrays(cache_dtype=cache_dtype)[:4]
  return jax.jit(step, donate_argnums=3), arrays


def decode_paged(
    batch: int,
    capacity: int,
    page_size: int = 64,
    cache_dtype: str | None = None,
) -> tuple[Any, Any]:
  """Ours over pages of a pool: the same step, of the same heads."""
  num_rows, num_pages = 8 * batch, capacity // page_size
  total = num_rows * num_pages
  pages = decode_shapes.Shape(
      num_heads=total, num_kv_heads=total, capacity=page_size
  ).arrays(cache_dtype=cache_dtype)[3]
  pool = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), pages
  )
  table = np.arange(total, dtype=np.int32)
  positions = np.full(batch, 1 << 20, np.int32)

  def step(query, key, value, pool):
    return decode_paged_api.decode_step(
        query,
        key,
        value,
        pool,
        jnp.asarray(table.reshape(num_rows, num_pages)),
        jnp.full(num_rows, num_pages, jnp.int32),
        jnp.asarray(positions),
        num_sinks=4,
        num_recent=capacity // 2,
        implementation="pallas_tpu",
    )

  vectors = (
      jax.ShapeDtypeStruct((batch, n, HEAD_DIM), jnp.bfloat16)
      for n in (32, 8, 8)
  )
  return jax.jit(step, donate_argnums=3), (*vectors, pool)


def paged(batch: int, capacity: int, page_size: int = 64) -> tuple[Any, Any]:
  """Paged attention of jax, of the same heads to as many keys.

  It computes no scores, chooses no slot, and writes no key.
  """
  num_pages = capacity // page_size
  table = np.arange(batch * num_pages, dtype=np.int32).reshape(batch, num_pages)

  def attend(query, key, value):
    return jax_paged.paged_attention(
        query,
        key,
        value,
        jnp.full(batch, capacity, jnp.int32),
        jnp.asarray(table),
        pages_per_compute_block=min(num_pages, 512 // page_size),
    )

  query = jax.ShapeDtypeStruct((batch, 32, HEAD_DIM), jnp.bfloat16)
  shape = (8, batch * num_pages, page_size, HEAD_DIM)
  return attend, (query, *2 * (jax.ShapeDtypeStruct(shape, jnp.bfloat16),))


def _heads_last(length: int, num_heads: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((1, length, num_heads, HEAD_DIM), jnp.bfloat16)


def _with_backward(attend: Any) -> Any:
  def both(query, key, value, d_out):
    return jax.vjp(attend, query, key, value)[1](d_out)

  return both
