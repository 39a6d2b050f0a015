"""Programs of decode, gathered MLP and linear attention for a GPU.

Each function returns (fn, abstract arguments): `launch.bench.kernels` times
them on a GPU, or compiles them for one that is not there. bfloat16 throughout,
heads of 128.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.decode import api as decode_api
from kernels_pallas.decode import shapes as decode_shapes
from kernels_pallas.gather_mlp import api as gather_api
from kernels_pallas.gather_mlp import shapes as gather_shapes
from kernels_pallas.linear_attention import api as linear_api
from kernels_pallas.linear_attention import shapes as linear_shapes

HEAD_DIM = 128


def decode_shape(batch: int, capacity: int) -> decode_shapes.Shape:
  """The heads of Llama-3-8B."""
  return decode_shapes.Shape(
      batch=batch, num_heads=32, num_kv_heads=8, capacity=capacity
  )


def decode(
    batch: int,
    capacity: int,
    cache_dtype: str = "bfloat16",
    implementation: Any = "pallas_gpu",
    **options: Any,
) -> tuple[Any, Any]:
  """A step that evicts; what it returns is what the next one takes.

  Args:
    batch: B.
    capacity: Slots.
    cache_dtype: Of keys and values.
    implementation: Whose.
    **options: Of the step.
  """

  def step(query, key, value, cache, positions):
    out, cache, _ = decode_api.decode_step(
        query,
        key,
        value,
        cache,
        positions,
        num_sinks=4,
        num_recent=64,
        implementation=implementation,
        **options,
    )
    # The next query is of the size of this one.
    return out + query, key, value, cache, positions + 1

  arrays = decode_shape(batch, capacity).arrays("bfloat16", cache_dtype)
  return jax.jit(step, donate_argnums=3), arrays


def attend_alone(batch: int, capacity: int, by: str) -> tuple[Any, Any]:
  """Attention of one query to as many keys, by jax; nothing else of a step."""
  shape = decode_shape(batch, capacity)
  array = lambda length, heads: jax.ShapeDtypeStruct(
      (batch, length, heads, HEAD_DIM), jnp.bfloat16
  )
  attend = functools.partial(jax.nn.dot_product_attention, implementation=by)
  keys = array(capacity, shape.num_kv_heads)
  return attend, (array(1, shape.num_heads), keys, keys)


def gather_mlp(
    shape: str,
    density: float,
    is_backward: bool = False,
    implementation: Any = "pallas_gpu",
) -> tuple[Any, Any]:
  """Chosen blocks, drawn once, the same for all sequences; or the gradients.

  Args:
    shape: A name in `gather_mlp.shapes.BENCHMARKS`.
    density: Share of the blocks, rounded, one at least.
    is_backward: Whether to return the gradients by x and weights instead.
    implementation: Whose.
  """
  sizes = gather_shapes.BENCHMARKS[shape]
  x, weights = sizes.arrays()
  order = np.random.default_rng(0).permutation(sizes.num_blocks)
  chosen = np.sort(order[: num_chosen(shape, density)]).astype(np.int32)
  given = {k: v for k, v in weights._asdict().items() if v is not None}

  def apply(x, given):
    return gather_api.gather_mlp(
        x,
        **given,
        block_ids=chosen,
        block_size=sizes.block_size,
        activation="silu" if sizes.is_gated else "relu",
        implementation=implementation,
    )

  if not is_backward:
    return apply, (x, given)
  gradients = lambda x, given, d_out: jax.vjp(apply, x, given)[1](d_out)
  return gradients, (x, given, x)


def num_chosen(shape: str, density: float) -> int:
  """Blocks of that share, one at least."""
  num_blocks = gather_shapes.BENCHMARKS[shape].num_blocks
  return max(round(density * num_blocks), 1)


def linear_shape(length: int) -> linear_shapes.Shape:
  """Heads that share nothing."""
  return linear_shapes.Shape(
      length=length, num_heads=16, num_kv_heads=16, head_dim=HEAD_DIM
  )


def linear(
    length: int, is_backward: bool = False, implementation: Any = "pallas_gpu"
) -> tuple[Any, Any]:
  """Linear attention with decays from 0.9 to 0.999; or its gradients.

  Args:
    length: T.
    is_backward: Whether to return the gradients by query, key and value.
    implementation: Whose.
  """
  shape = linear_shape(length)
  decay = np.linspace(0.9, 0.999, shape.num_heads, dtype=np.float32)

  def attend(query, key, value):
    return linear_api.linear_attention(
        query,
        key,
        value,
        decay=jnp.asarray(decay),
        implementation=implementation,
    ).out

  arrays = shape.arrays()
  if not is_backward:
    return attend, arrays
  gradients = lambda q, k, v, d_out: jax.vjp(attend, q, k, v)[1](d_out)
  return gradients, (*arrays, arrays[0])
