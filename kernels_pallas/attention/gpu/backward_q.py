"""Gradient by query on a GPU: queries stay and keys stream.

d_query = scale dS key, with dS as in `backward_kv`.
"""

from collections.abc import Callable, Mapping
import functools
import math
from typing import Any

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.attention.gpu import stream
from kernels_pallas.attention.gpu import task as task_lib
from kernels_pallas.hardware import gpu_layout
from kernels_pallas.hardware import gpu_math
from kernels_pallas.hardware import gpu_registers
from kernels_pallas.hardware import types as hw_types
from kernels_pallas.transformations import manual_axes

plgpu = gpu_layout.plgpu
_ROWS = gpu_layout.ROWS


def choose(limits: task_lib.Limits) -> gpu_layout.TileConfig:
  """Tiles for keys and values of that size."""
  return gpu_layout.TileConfig(
      block_q=math.gcd(limits.most_q, 128),
      block_kv=math.gcd(limits.most_kv, 64 if limits.head_dim == 128 else 128),
      num_stages=4,
  )


def smem_bytes(config: gpu_layout.TileConfig, head_dim: int) -> int:
  """Shared memory of a block: queries, d_out, and the ring of keys."""
  row = 2 * 2 * head_dim
  return config.block_q * row + config.num_stages * config.block_kv * row


def backward_q(
    arrays: task_lib.Gradient, task: task_lib.Task
) -> Float[Array, "B T N H"]:
  """Computes the cotangent of query.

  Args:
    arrays: Of the backward pass.
    task: Its lists are of key tiles, for each query tile.

  Raises:
    ValueError: If the tiles do not fit into shared memory.
  """
  config, query, key = task.config, arrays.query, arrays.key
  batch, num_queries, num_heads, head_dim = query.shape
  gpu_layout.check_smem("backward_q", smem_bytes(config, head_dim), config)
  results = gpu_layout.launch(
      functools.partial(_kernel, task),
      "attention_backward_q",
      arrays.inputs_of(task),
      {"d_query": manual_axes.struct(query.shape, query.dtype)},
      _scratch(config, head_dim, key.dtype),
      {
          "batch": batch,
          "head": num_heads,
          "tile": -(-num_queries // config.block_q),
      },
      config.block_q // _ROWS,
  )
  return results["d_query"]


def _scratch(
    config: gpu_layout.TileConfig, head_dim: int, dtype: jnp.dtype
) -> dict[str, Any]:
  """Shared memory by name."""
  num_consumers, stages = config.block_q // _ROWS, config.num_stages
  buffer = gpu_layout.tile_buffer
  ring = (
      (buffer(stages, config.block_kv, head_dim, dtype),),
      *stream.barriers(stages, 1, num_consumers),
  )
  stays = buffer(num_consumers, _ROWS, head_dim, dtype)
  return {
      "key": ring,
      "value": ring,
      "query": stays,
      "d_out": stays,
      "ready": plgpu.Barrier(num_arrivals=2, num_barriers=num_consumers),
  }


def _kernel(
    task: task_lib.Task, refs: Mapping[str, Any], scratch: Mapping[str, Any]
) -> None:
  """One tile of queries of one head."""
  place = task_lib.place_of(task, refs)
  batch, head, _, group, num_consumers, walk, first_query = place
  channels = {x: stream.Channel(*scratch[x]) for x in ("key", "value")}
  rows = pl.ds(first_query, _ROWS)

  @pl.when(group == num_consumers)
  def _produce():
    task_lib.produce_keys(place, refs, channels)

  @pl.when(group < num_consumers)
  def _consume():
    gpu_registers.borrow_registers(num_consumers)
    query, d_out = scratch["query"].at[group], scratch["d_out"].at[group]
    ready = scratch["ready"].at[group]
    plgpu.copy_gmem_to_smem(refs["query"].at[batch, rows, head], query, ready)
    plgpu.copy_gmem_to_smem(refs["d_out"].at[batch, rows, head], d_out, ready)
    plgpu.barrier_wait(ready)
    visit = functools.partial(
        _visit,
        query=query,
        d_out=d_out,
        lse=gpu_registers.load_vector(
            refs["lse"].at[batch, head, rows], axis=0
        ),
        delta=gpu_registers.load_vector(
            refs["delta"].at[batch, head, rows], axis=0
        ),
        task=task,
        allowed=task.allowed(refs, batch, first_query, query_axis=0),
        **channels,
    )
    zeros = gpu_registers.filled(query.shape, 0.0)
    d_query = stream.consume(
        walk, task.config.num_stages, task.kinds, visit, zeros
    )
    # The queries have been read for the last time; their memory is reused.
    query[...] = (d_query * task.scale).astype(query.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(query, refs["d_query"].at[batch, rows, head])
    plgpu.wait_smem_to_gmem(0)


def _visit(
    tile: Callable[[], hw_types.Index],
    slot: hw_types.Index,
    d_query: jax.Array,
    *,
    is_partial: bool,
    query: hw_types.Ref,
    d_out: hw_types.Ref,
    lse: jax.Array,
    delta: jax.Array,
    task: task_lib.Task,
    allowed: Callable[[hw_types.Index], jax.Array],
    key: stream.Channel,
    value: stream.Channel,
) -> jax.Array:
  """Adds what one tile of keys gives to d_query."""
  keys, values = key.buffers[0].at[slot], value.buffers[0].at[slot]
  plgpu.barrier_wait(key.ready.at[slot])
  logits = task.logits_of(gpu_registers.product(query, keys.transpose((1, 0))))
  if is_partial:
    logits = jnp.where(allowed(tile()), logits, -jnp.inf)
  # exp(logits - lse) is final: lse is known, so that nothing is corrected.
  slopes = gpu_math.weights_of(logits, lse, axis=0)
  slopes = task.slopes_of(slopes, logits)
  plgpu.barrier_wait(value.ready.at[slot])
  d_weights = gpu_registers.product(d_out, values.transpose((1, 0)))
  plgpu.barrier_arrive(value.free.at[slot])
  d_logits = gpu_math.d_products(slopes, d_weights, delta, axis=0)
  d_query = gpu_registers.accumulate(
      d_query, d_logits.astype(query.dtype), keys
  )
  plgpu.barrier_arrive(key.free.at[slot])
  return d_query
