"""Programs of others that `launch.bench.kernels` compiles or times.

Those that are compiled for a TPU return (fn, abstract arguments), as those of
`programs`. Those that a GPU runs are functions of query, key and value, all
causal; beside them are the inputs that they get, and how far they are off.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any, Literal

import jax
from jax.experimental.pallas.ops.tpu import flash_attention as jax_flash
from jax.experimental.pallas.ops.tpu import paged_attention as jax_paged
from jax.experimental.pallas.ops.tpu import splash_attention as jax_splash
import jax.numpy as jnp
from jaxtyping import Array, PyTree
import numpy as np

from kernels_pallas import masks
from kernels_pallas.attention import api
from kernels_pallas.attention import shapes
from kernels_pallas.attention.gpu import entry
from kernels_pallas.gather_mlp import parts
from kernels_pallas.gather_mlp import shapes as gather_shapes
from launch.bench import harness
from launch.bench.ops import programs


def flash(length: int, block: int, num_heads: int = 1) -> programs.Program:
  """Flash attention of jax."""
  sizes = jax_flash.BlockSizes(
      block_q=block, block_k_major=block, block_k=block, block_b=1
  )
  attend = functools.partial(
      jax_flash.flash_attention, causal=True, block_sizes=sizes
  )
  shape = (1, num_heads, length, programs.HEAD_DIM)
  return attend, (jax.ShapeDtypeStruct(shape, jnp.bfloat16),) * 3


def splash(
    length: int,
    block: int | Sequence[int],
    num_heads: int = 1,
    is_backward: bool = False,
) -> programs.Program:
  """Splash attention of jax, with its fused backward kernel.

  Args:
    length: T.
    block: Queries, keys, and keys of one product of a tile; or all in one. Of
      the backward pass where that is asked for.
    num_heads: N.
    is_backward: Whether to return the gradients instead.
  """
  blocks = [block] * 3 if isinstance(block, int) else block
  forward = [512] * 3 if is_backward else blocks
  names = ("block_q", "block_kv", "block_kv_compute")
  of_pass: dict[str, Any] = dict(zip(names, forward, strict=True))
  if is_backward:
    names = ("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    of_pass |= dict(zip(names, blocks, strict=True))
  sizes = jax_splash.BlockSizes(**of_pass, use_fused_bwd_kernel=is_backward)
  causal = jax_splash.CausalMask((length, length))
  mask = jax_splash.MultiHeadMask([causal] * num_heads)
  kernel = jax_splash.make_splash_mha_single_device(mask, block_sizes=sizes)
  attend = lambda *arrays: kernel(*arrays)
  array = jax.ShapeDtypeStruct(
      (num_heads, length, programs.HEAD_DIM), jnp.bfloat16
  )
  if is_backward:
    return programs.with_backward(attend), (array,) * 4
  return attend, (array,) * 3


def paged(batch: int, capacity: int, page_size: int = 64) -> programs.Program:
  """Paged attention of jax, of the same heads to as many keys.

  It computes no scores, chooses no slot, and writes no key.
  """
  num_pages = capacity // page_size
  table = np.arange(batch * num_pages, dtype=np.int32).reshape(batch, num_pages)

  def attend(query: Array, key: Array, value: Array) -> Array:
    return jax_paged.paged_attention(
        query,
        key,
        value,
        jnp.full(batch, capacity, jnp.int32),
        jnp.asarray(table),
        pages_per_compute_block=min(num_pages, 512 // page_size),
    )

  query = jax.ShapeDtypeStruct((batch, 32, programs.HEAD_DIM), jnp.bfloat16)
  shape = (8, batch * num_pages, page_size, programs.HEAD_DIM)
  return attend, (query, *2 * (jax.ShapeDtypeStruct(shape, jnp.bfloat16),))


def dense_mlp(shape: str) -> programs.Program:
  """The MLP of all neurons by XLA, products of bfloat16 with float32 sums."""
  sizes = gather_shapes.BENCHMARKS[shape]

  def apply(x: Array, weights: parts.Weights) -> Array:
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


def attend_alone(
    batch: int, capacity: int, by: Literal["cudnn", "xla"]
) -> programs.Program:
  """Attention of one query to as many keys, by jax; nothing else of a step."""
  shape = programs.decode_shape(batch, capacity)
  array = lambda length, heads: jax.ShapeDtypeStruct(
      (batch, length, heads, programs.HEAD_DIM), jnp.bfloat16
  )
  attend = functools.partial(jax.nn.dot_product_attention, implementation=by)
  keys = array(capacity, shape.num_kv_heads)
  return attend, (array(1, shape.num_heads), keys, keys)


def forward_peers(mask: masks.Mask) -> dict[str, Callable[..., Any]]:
  """Causal attentions by name; functions of query, key and value.

  Those with "+col_mass" return column sums too. `mask` is the causal one.
  """
  ours = functools.partial(api.attention, where=mask)
  cudnn = entry.Config(forward_by="cudnn")
  peers = {
      "pallas_gpu": functools.partial(ours, implementation="pallas_gpu"),
      "pallas_gpu+col_mass": functools.partial(
          ours, implementation="pallas_gpu", return_col_mass=True
      ),
      "cudnn+col_mass": functools.partial(
          ours, implementation="pallas_gpu", return_col_mass=True, config=cudnn
      ),
      "xla": functools.partial(ours, implementation="xla"),
  }
  by_jax = functools.partial(jax.nn.dot_product_attention, is_causal=True)
  return {
      "cudnn": functools.partial(by_jax, implementation="cudnn"),
      **{
          name: functools.partial(arrays_of, call)
          for name, call in peers.items()
      },
      "jax_mosaic": _jax_mosaic,
      "jax_xla": functools.partial(by_jax, implementation="xla"),
  }


def gradient_of(attention: Callable[..., Any]) -> Callable[..., PyTree]:
  """What training computes of an attention: forward, and three gradients."""

  def loss(query: Array, key: Array, value: Array) -> Array:
    out = attention(query, key, value)
    out = out if isinstance(out, tuple) else (out,)
    dtype = jnp.promote_types(out[0].dtype, jnp.float32)
    # lse, where there is one, is second; what is after that has no gradient.
    finite = [jnp.where(jnp.isneginf(x), 0.0, x) for x in out[:2]]
    squares = [(x.astype(dtype) ** 2).sum() for x in finite]
    return sum(squares, start=jnp.zeros((), dtype))

  return jax.grad(loss, argnums=(0, 1, 2))


def dtype_of(peer: str) -> jax.typing.DTypeLike:
  """The type of the inputs: jax's own kernel has float16 alone."""
  return jnp.float16 if peer == "jax_mosaic" else jnp.bfloat16


def inputs(
    shape: shapes.Shape, dtype: jax.typing.DTypeLike, seed: int
) -> tuple[Array, ...]:
  """Normal query, key and value of a shape."""
  return tuple(
      normal(3 * seed + i, array.shape, dtype)
      for i, array in enumerate(shape.arrays())
  )


def arrays_of(
    call: Callable[..., Any], *arguments: Array, **options: Any
) -> tuple[Array, ...]:
  """Out, and of lse and column sums what there is."""
  return tuple(x for x in call(*arguments, **options) if x is not None)


def relative_error(
    call: Callable[..., PyTree],
    exact: Callable[..., PyTree],
    make: Callable[[], tuple[Array, ...]],
) -> harness.Row:
  """The largest relative error, and in the note that of each output."""
  arguments = make()
  found = jax.tree.leaves(jax.jit(call)(*arguments))
  with jax.enable_x64(True):
    wide = [jnp.asarray(np.asarray(x, np.float64)) for x in arguments]
    expected = [np.asarray(x) for x in jax.tree.leaves(jax.jit(exact)(*wide))]
  errors = []
  for x, y in zip(found, expected, strict=True):
    is_finite = np.isfinite(y)  # lse is -inf where there is no key.
    difference = np.where(is_finite, np.asarray(x, np.float64) - y, 0.0)
    norm = np.linalg.norm(np.where(is_finite, y, 0.0))
    errors.append(float(np.linalg.norm(difference) / norm))
  note = ", ".join(f"{error:.1e}" for error in errors)
  return {"error": max(errors), "note": note}


@functools.partial(jax.jit, static_argnums=(1, 2))
def normal(
    seed: int,
    shape: tuple[int, ...],
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> jax.Array:
  """Normal numbers of a seed."""
  return jax.random.normal(jax.random.key(seed), shape, dtype)


def _jax_mosaic(query: Array, key: Array, value: Array) -> Array:
  """Hopper attention as shipped with jax: no scale, and no causal backward."""
  from jax.experimental.pallas.ops.gpu import attention_mgpu

  config = attention_mgpu.TuningConfig(
      block_q=64, block_kv=128, max_concurrent_steps=2, causal=True
  )
  scale = np.asarray(query.shape[-1] ** -0.5, query.dtype)
  return attention_mgpu.attention(query * scale, key, value, config)
