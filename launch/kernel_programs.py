"""Programs that `launch.bench_kernels` compiles: ours and jax's own kernels.

Each function returns (fn, abstract arguments): causal heads that share nothing,
bfloat16, of head size 128, which is how schedules are compared. A chip whose
two cores work as one gets two heads, one a core.
"""

import functools
from typing import Any

import jax
from jax.experimental.pallas.ops.tpu import flash_attention as jax_flash
from jax.experimental.pallas.ops.tpu import splash_attention as jax_splash
import jax.numpy as jnp
import numpy as np

from kernels_pallas import masks
from kernels_pallas import selection as selection_lib
from kernels_pallas.block_sparse_attention import api as block_sparse
from kernels_pallas.flash_attention import api
from kernels_pallas.tiles import tpu_config

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
  config = tpu_config.Config(block_q=block, block_kv=block, col_mass=col_mass)

  def attend(*arrays):
    result = api.flash_attention(
        *arrays,
        mask=masks.causal(length) if is_causal else None,
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
    return block_sparse.block_sparse_attention(
        *arrays, selection=selection, implementation="pallas_tpu"
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


def _heads_last(length: int, num_heads: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((1, length, num_heads, HEAD_DIM), jnp.bfloat16)


def _with_backward(attend: Any) -> Any:
  def both(query, key, value, d_out):
    return jax.vjp(attend, query, key, value)[1](d_out)

  return both
