"""Programs of ours that `launch.bench.kernels` compiles or times.

Each function returns (fn, abstract arguments), bfloat16, heads of 128. Of
attention: causal heads that share nothing, which is how schedules are compared.
A TPU whose two cores work as one gets two heads, one a core.
"""

from collections.abc import Callable
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree
import numpy as np

from kernels_pallas import implementations
from kernels_pallas import masks
from kernels_pallas import selection as selection_lib
from kernels_pallas.attention import api
from kernels_pallas.attention.tpu import plan
from kernels_pallas.decode import api as decode_api
from kernels_pallas.decode import shapes as decode_shapes
from kernels_pallas.decode import slots as slots_lib
from kernels_pallas.decode.coded import api as coded_api
from kernels_pallas.decode.coded import codes
from kernels_pallas.decode.paged import api as decode_paged_api
from kernels_pallas.gather_mlp import api as gather_api
from kernels_pallas.gather_mlp import shapes as gather_shapes
from kernels_pallas.linear_attention import api as linear_api
from kernels_pallas.linear_attention import pallas_tpu as linear_tpu
from kernels_pallas.linear_attention import shapes as linear_shapes
from kernels_pallas.linear_attention import sweep as sweep_lib

HEAD_DIM = 128
# What is compiled, and its abstract arguments.
Program = tuple[Callable[..., PyTree], tuple[PyTree, ...]]


def forward(
    length: int,
    block: int | None = None,
    num_heads: int = 1,
    return_col_mass: bool = False,
    col_mass: Literal["two_pass"] | None = None,
    is_causal: bool = True,
) -> Program:
  """Ours, with or without exact column sums, made as `col_mass` says."""
  config = plan.AttentionTpuConfig(
      block_q=block, block_kv=block, col_mass=col_mass
  )

  def attend(*arrays: Array) -> PyTree:
    result = api.attention(
        *arrays,
        where=masks.causal(length) if is_causal else None,
        return_col_mass=return_col_mass,
        implementation="pallas_tpu",
        config=config,
    )
    return (result.out, result.col_mass) if return_col_mass else result.out

  return attend, (heads_last(length, num_heads),) * 3


def backward(
    length: int, block: int | None = None, num_heads: int = 1
) -> Program:
  """Ours: forward and backward; the latter is the last kernel."""
  attend, arrays = forward(length, block, num_heads)
  return with_backward(attend), (*arrays, arrays[0])


def sparse(
    length: int,
    block_q: int,
    block_kv: int,
    density: float,
    num_heads: int = 1,
    is_backward: bool = False,
) -> Program:
  """Ours under a random selection that is known; see `random_selection`."""
  selection = random_selection(length, num_heads, block_q, block_kv, density)

  def attend(*arrays: Array) -> Array:
    return api.attention(
        *arrays, where=selection, implementation="pallas_tpu"
    ).out

  array = heads_last(length, num_heads)
  if is_backward:
    return with_backward(attend), (array,) * 4
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


def linear_shape(length: int, num_heads: int = 16) -> linear_shapes.Shape:
  """Heads that share nothing."""
  return linear_shapes.Shape(
      length=length,
      num_heads=num_heads,
      num_kv_heads=num_heads,
      head_dim=HEAD_DIM,
  )


def linear(
    length: int,
    is_backward: bool = False,
    implementation: implementations.Implementation = "pallas_tpu",
    num_heads: int = 16,
    chunk: int | None = None,
) -> Program:
  """Our linear attention with decays from 0.9 to 0.999; or its gradients.

  Args:
    length: T.
    is_backward: Whether to return the gradients by query, key and value.
    implementation: Whose.
    num_heads: N, which share nothing.
    chunk: Positions of a chunk on a TPU; None is the kernel's choice.
  """
  decay = np.linspace(0.9, 0.999, num_heads, dtype=np.float32)
  config = linear_tpu.Config(chunk=chunk) if chunk else None

  def attend(*arrays: Array) -> Array:
    return linear_api.linear_attention(
        *arrays,
        decay=jnp.asarray(decay),
        implementation=implementation,
        config=config,
    ).out

  arrays = linear_shape(length, num_heads).arrays()
  if is_backward:
    return with_backward(attend), (*arrays, arrays[0])
  return attend, arrays


def linear_sweep(length: int, num_heads: int = 1) -> Program:
  """A reversed sweep; the backward pass is a forward sweep and two of these."""

  def sweep(query: Array, key: Array, value: Array) -> PyTree:
    log_decay = jnp.full(num_heads, math.log(0.99))
    state = jnp.zeros((1, num_heads, HEAD_DIM, HEAD_DIM))
    options = sweep_lib.Sweep(is_reversed=True, config=linear_tpu.Config())
    operands = sweep_lib.Operands(query, key, value, log_decay, state)
    return linear_tpu.run(operands, options)[0]

  return sweep, linear_shape(length, num_heads).arrays()


def num_chosen(shape: str, density: float) -> int:
  """Blocks of that share, one at least."""
  num_blocks = gather_shapes.BENCHMARKS[shape].num_blocks
  return max(round(density * num_blocks), 1)


def gather_mlp(
    shape: str,
    density: float,
    is_backward: bool = False,
    implementation: implementations.Implementation = "pallas_tpu",
) -> Program:
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
  given: dict[str, Any] = {
      k: v for k, v in weights._asdict().items() if v is not None
  }

  def apply(x: Array, given: dict[str, Any]) -> Array:
    return gather_api.gather_mlp(
        x,
        **given,
        block_ids=chosen,
        block_size=sizes.block_size,
        activation="silu" if sizes.is_gated else "relu",
        implementation=implementation,
    )

  if is_backward:
    both = lambda x, given, d_out: jax.vjp(apply, x, given)[1](d_out)
    return both, (x, given, x)
  return apply, (x, given)


def decode_shape(batch: int, capacity: int) -> decode_shapes.Shape:
  """The heads of Llama-3-8B."""
  return decode_shapes.Shape(
      batch=batch, num_heads=32, num_kv_heads=8, capacity=capacity
  )


def decode(
    batch: int, capacity: int, cache_dtype: str | None = None
) -> Program:
  """Ours: a step of 32 query and 8 key heads, with eviction, in place."""
  arrays = decode_shape(batch, capacity).arrays(cache_dtype=cache_dtype)[:4]
  # Known, so that it is known too which sequences are active.
  positions = np.full(batch, 1 << 20, np.int32)
  evict = functools.partial(
      decode_api.decode_step,
      positions=jnp.asarray(positions),
      num_sinks=4,
      num_recent=capacity // 2,
      implementation="pallas_tpu",
  )
  return jax.jit(lambda *arrays: evict(*arrays), donate_argnums=3), arrays


def decode_coded(batch: int, capacity: int) -> Program:
  """A step over `capacity` keys and values of four bits, all blocks full."""
  shape = decode_shape(batch, capacity)
  size, head_dim = 128, shape.head_dim
  spec = jax.ShapeDtypeStruct
  lead = (batch, capacity // size, shape.num_kv_heads)
  data = spec((*lead, size // 2, head_dim), jnp.uint8)
  # As many channels as tokens: keys' and values' scales have one shape.
  small = spec((*lead, size), jnp.bfloat16)
  blocks = codes.Blocks(data, small, small)
  newest = spec((batch, shape.num_kv_heads, size, head_dim), jnp.bfloat16)
  query = spec((batch, shape.num_heads, head_dim), jnp.bfloat16)
  # Known, so that the schedule is that of full blocks.
  positions = jnp.full(batch, capacity, jnp.int32)
  attend = functools.partial(
      coded_api.attend,
      positions=positions,
      scale=head_dim**-0.5,
      implementation="pallas_tpu",
  )
  return jax.jit(attend), (query, blocks, blocks, newest, newest)


def decode_on(
    batch: int,
    capacity: int,
    cache_dtype: str = "bfloat16",
    implementation: implementations.Implementation = "pallas_gpu",
    reduce: Literal["sum", "max"] = "sum",
) -> Program:
  """A step that evicts; what it returns is what the next one takes.

  Args:
    batch: B.
    capacity: Slots.
    cache_dtype: Of keys and values.
    implementation: Whose.
    reduce: What a slot keeps of the weights that it gets.
  """

  def step(
      query: Array,
      key: Array,
      value: Array,
      cache: slots_lib.Slots,
      positions: Array,
  ) -> PyTree:
    out, cache, _ = decode_api.decode_step(
        query,
        key,
        value,
        cache,
        positions,
        num_sinks=4,
        num_recent=64,
        reduce=reduce,
        implementation=implementation,
    )
    # The next query is of the size of this one.
    return out + query, key, value, cache, positions + 1

  arrays = decode_shape(batch, capacity).arrays("bfloat16", cache_dtype)
  return jax.jit(step, donate_argnums=3), arrays


def decode_paged(
    batch: int,
    capacity: int,
    page_size: int = 64,
    cache_dtype: str | None = None,
) -> Program:
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

  def step(query: Array, key: Array, value: Array, pool: PyTree) -> PyTree:
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

  vectors = decode_shape(batch, capacity).arrays()[:3]
  return jax.jit(step, donate_argnums=3), (*vectors, pool)


def heads_last(length: int, num_heads: int) -> jax.ShapeDtypeStruct:
  """An abstract array [1, T, N, H]."""
  return jax.ShapeDtypeStruct((1, length, num_heads, HEAD_DIM), jnp.bfloat16)


def with_backward(attend: Callable[..., PyTree]) -> Callable[..., PyTree]:
  """The gradients of an attention, for the gradient of its output."""

  def both(query: Array, key: Array, value: Array, d_out: Array) -> PyTree:
    return jax.vjp(attend, query, key, value)[1](d_out)

  return both
