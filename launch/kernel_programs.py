"""Programs that `launch.bench_kernels` compiles: ours and jax's own kernels.

Each function returns (fn, abstract arguments): one causal head, bfloat16, of
head size 128, which is how a schedule is compared.
"""

import functools
from typing import Any

import jax
from jax.experimental.pallas.ops.tpu import flash_attention as jax_flash
from jax.experimental.pallas.ops.tpu import splash_attention as jax_splash
import jax.numpy as jnp

from kernels_pallas import masks
from kernels_pallas.flash_attention import api
from kernels_pallas.tiles import tpu_config

_HEAD_DIM = 128


def forward(
    length: int, block: int, return_col_mass: bool = False
) -> tuple[Any, Any]:
  """Ours, with or without exact column sums from the strip."""
  config = tpu_config.Config(block_q=block, block_kv=block)

  def attend(*arrays):
    result = api.flash_attention(
        *arrays,
        mask=masks.causal(length),
        return_col_mass=return_col_mass,
        implementation="pallas_tpu",
        config=config,
    )
    return (result.out, result.col_mass) if return_col_mass else result.out

  return attend, (_heads_last(length),) * 3


def backward(length: int, block: int) -> tuple[Any, Any]:
  """Ours: forward and backward; the latter is the last kernel."""
  attend, arrays = forward(length, block)
  return _with_backward(attend), (*arrays, arrays[0])


def flash(length: int, block: int) -> tuple[Any, Any]:
  """Flash attention of jax."""
  sizes = jax_flash.BlockSizes(
      block_q=block, block_k_major=block, block_k=block, block_b=1
  )
  attend = functools.partial(
      jax_flash.flash_attention, causal=True, block_sizes=sizes
  )
  array = jax.ShapeDtypeStruct((1, 1, length, _HEAD_DIM), jnp.bfloat16)
  return attend, (array,) * 3


def splash(
    length: int, block: int, is_backward: bool = False
) -> tuple[Any, Any]:
  """Splash attention of jax, with its fused backward kernel."""
  names = ["block_q", "block_kv", "block_kv_compute"]
  if is_backward:
    names += ["block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"]
  blocks: Any = dict.fromkeys(names, block)
  sizes = jax_splash.BlockSizes(**blocks, use_fused_bwd_kernel=is_backward)
  mask = jax_splash.MultiHeadMask([jax_splash.CausalMask((length, length))])
  kernel = jax_splash.make_splash_mha_single_device(mask, block_sizes=sizes)
  attend = lambda *arrays: kernel(*arrays)
  array = jax.ShapeDtypeStruct((1, length, _HEAD_DIM), jnp.bfloat16)
  if is_backward:
    return _with_backward(attend), (array,) * 4
  return attend, (array,) * 3


def _heads_last(length: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((1, length, 1, _HEAD_DIM), jnp.bfloat16)


def _with_backward(attend: Any) -> Any:
  def both(query, key, value, d_out):
    return jax.vjp(attend, query, key, value)[1](d_out)

  return both
