"""Gradients by key and value on a GPU: keys stay and queries stream.

With P = exp(logits - lse) and dS = P (d_out value^T - delta): d_value = P^T
d_out and d_key = scale dS^T query, over all query heads of a key head. The sums
stay in registers: no atomic additions, hence the same bits every time.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import math
from typing import Any

import jax
from jax import lax
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

# d_key and d_value of a warpgroup's keys so far; nothing where copies are made.
_Sums = tuple[jax.Array, ...]
_Work = Callable[[hw_types.Index, stream.Walk, hw_types.Index, _Sums], _Sums]


def choose(limits: task_lib.Limits) -> gpu_layout.TileConfig:
  """Tiles for keys of that size; 64 queries always fit into registers."""
  return gpu_layout.TileConfig(
      block_q=math.gcd(limits.most_q, 64),
      block_kv=math.gcd(limits.most_kv, 128),
      num_stages=4,
  )


def smem_bytes(config: gpu_layout.TileConfig, head_dim: int) -> int:
  """Shared memory of a block: keys, values, and the ring of queries."""
  row = 2 * 2 * head_dim
  ring = config.num_stages * config.block_q * (row + 8)
  return config.block_kv * row + ring


def backward_kv(
    arrays: task_lib.Gradient, task: task_lib.Task
) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
  """Computes the cotangents of key and value.

  Args:
    arrays: Of the backward pass.
    task: Its lists are of query tiles, for each key tile.

  Raises:
    ValueError: If the tiles do not fit into shared memory.
  """
  config, query, key = task.config, arrays.query, arrays.key
  batch, num_queries, _, head_dim = query.shape
  num_keys, num_kv_heads = key.shape[1:3]
  gpu_layout.check_smem("backward_kv", smem_bytes(config, head_dim), config)
  like = manual_axes.struct(key.shape, key.dtype)
  results = gpu_layout.launch(
      functools.partial(_kernel, task),
      "attention_backward_kv",
      arrays.inputs_of(task),
      {"d_key": like, "d_value": like},
      _scratch(config, head_dim, key.dtype),
      {
          "batch": batch,
          "kv_head": num_kv_heads,
          "tile": -(-num_keys // config.block_kv),
      },
      config.block_kv // _ROWS,
  )
  return results["d_key"], results["d_value"]


def _scratch(
    config: gpu_layout.TileConfig, head_dim: int, dtype: jnp.dtype
) -> dict[str, Any]:
  """Shared memory by name."""
  num_consumers, stages = config.block_kv // _ROWS, config.num_stages
  buffer = gpu_layout.tile_buffer
  # Queries with lse, d_out with delta.
  ring = (
      (
          buffer(stages, config.block_q, head_dim, dtype),
          plgpu.SMEM((stages, config.block_q), jnp.float32),
      ),
      *stream.barriers(stages, 2, num_consumers),
  )
  stays = buffer(num_consumers, _ROWS, head_dim, dtype)
  return {
      "query": ring,
      "d_out": ring,
      "key": stays,
      "value": stays,
      "ready": plgpu.Barrier(num_arrivals=2, num_barriers=num_consumers),
  }


def _kernel(
    task: task_lib.Task,
    refs: Mapping[str, hw_types.Ref],
    scratch: Mapping[str, Any],
) -> None:
  """One tile of keys, under all query heads of their head."""
  group = lax.axis_index("warpgroup")
  num_consumers = task.config.block_kv // _ROWS
  channels = tuple(stream.Channel(*scratch[x]) for x in ("query", "d_out"))

  @pl.when(group == num_consumers)
  def _():
    gpu_registers.lend_registers(num_consumers)
    _produce(task, refs, channels)

  @pl.when(group < num_consumers)
  def _():
    gpu_registers.borrow_registers(num_consumers)
    key, value, ready = (
        scratch[name].at[group] for name in ("key", "value", "ready")
    )
    _consume(task, refs, channels, key, value, ready)


def _for_each_head(
    refs: Mapping[str, hw_types.Ref], work: _Work, carry: _Sums
) -> tuple[jax.Array, _Sums]:
  """Does carry = work(head, walk, first_step, carry) for each query head.

  Returns:
    How many tiles went through the ring, and the carry.
  """
  batch, kv_head = lax.axis_index("batch"), lax.axis_index("kv_head")
  num_groups = refs["query"].shape[2] // refs["key"].shape[2]

  def step(
      i: hw_types.Index, state: tuple[jax.Array, _Sums]
  ) -> tuple[jax.Array, _Sums]:
    first_step, carry = state
    head = kv_head * num_groups + i
    walk = stream.walk_of(refs, batch, head, lax.axis_index("tile"))
    carry = work(head, walk, first_step, carry)
    return first_step + walk.num_valid, carry

  # The ring goes on over all heads of the group: steps are counted through.
  state = (jnp.int32(0), carry)
  if num_groups == 1:
    return step(0, state)
  return lax.fori_loop(0, num_groups, step, state)


def _produce(
    task: task_lib.Task,
    refs: Mapping[str, hw_types.Ref],
    channels: tuple[stream.Channel, ...],
) -> None:
  """Orders the copies of all tiles of queries."""
  names = (("query", "lse"), ("d_out", "delta"))

  def work(
      head: hw_types.Index,
      walk: stream.Walk,
      first_step: hw_types.Index,
      carry: _Sums,
  ) -> _Sums:
    copies = [
        functools.partial(
            _copy_rows, refs, pair, head, channel, task.config.block_q
        )
        for pair, channel in zip(names, channels, strict=True)
    ]
    stream.produce(walk, channels, copies, first_step)
    return carry

  num_steps, _ = _for_each_head(refs, work, ())
  stream.drain(channels, num_steps)


def _consume(
    task: task_lib.Task,
    refs: Mapping[str, hw_types.Ref],
    channels: tuple[stream.Channel, ...],
    key: hw_types.Ref,
    value: hw_types.Ref,
    ready: hw_types.Barrier,
) -> None:
  """Sums the gradients of 64 keys, and writes them."""
  config, batch = task.config, lax.axis_index("batch")
  # Each warpgroup has 64 keys of the tile, and all of them the same queries.
  first_key = lax.axis_index("tile") * config.block_kv
  first_key += lax.axis_index("warpgroup") * _ROWS
  here = (batch, pl.ds(first_key, _ROWS), lax.axis_index("kv_head"))
  plgpu.copy_gmem_to_smem(refs["key"].at[here], key, ready)
  plgpu.copy_gmem_to_smem(refs["value"].at[here], value, ready)
  plgpu.barrier_wait(ready)
  visit = functools.partial(
      _visit,
      key=key,
      value=value,
      channels=channels,
      task=task,
      allowed=task.allowed(refs, batch, first_key, query_axis=1),
  )
  work = lambda head, walk, first_step, carry: stream.consume(
      walk, config.num_stages, task.kinds, visit, carry, first_step
  )
  # Summed over queries and heads in registers, rounded once at the end.
  zeros = gpu_registers.filled(key.shape, 0.0)
  _, (d_key, d_value) = _for_each_head(refs, work, (zeros, zeros))
  # Keys and values have been read for the last time: their memory takes the
  # gradients, from which TMA writes them.
  key[...] = (d_key * task.scale).astype(key.dtype)
  value[...] = d_value.astype(value.dtype)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(key, refs["d_key"].at[here])
  plgpu.copy_smem_to_gmem(value, refs["d_value"].at[here])
  plgpu.wait_smem_to_gmem(0)


def _copy_rows(
    refs: Mapping[str, hw_types.Ref],
    names: Sequence[str],
    head: hw_types.Index,
    channel: stream.Channel,
    block_q: int,
    tile: hw_types.Index,
    slot: hw_types.Index,
    ready: hw_types.Barrier,
) -> None:
  """Orders the copies of a tile of rows, and of their numbers."""
  batch, rows = lax.axis_index("batch"), pl.ds(tile * block_q, block_q)
  matrix, numbers = (buffer.at[slot] for buffer in channel.buffers)
  plgpu.copy_gmem_to_smem(refs[names[0]].at[batch, rows, head], matrix, ready)
  plgpu.copy_gmem_to_smem(refs[names[1]].at[batch, head, rows], numbers, ready)


def _visit(
    tile: Callable[[], hw_types.Index],
    slot: hw_types.Index,
    carry: tuple[jax.Array, ...],
    *,
    is_partial: bool,
    key: hw_types.Ref,
    value: hw_types.Ref,
    channels: tuple[stream.Channel, ...],
    task: task_lib.Task,
    allowed: Callable[[hw_types.Index], jax.Array],
) -> tuple[jax.Array, jax.Array]:
  """Adds what one tile of queries gives to d_key and d_value."""
  d_key, d_value = carry
  (query, lse), (d_out, delta) = (
      [buffer.at[slot] for buffer in channel.buffers] for channel in channels
  )
  dtype = key.dtype
  plgpu.barrier_wait(channels[0].ready.at[slot])
  logits = task.logits_of(gpu_registers.product(key, query.transpose((1, 0))))
  if is_partial:
    logits = jnp.where(allowed(tile()), logits, -jnp.inf)
  lse = gpu_registers.load_vector(lse, axis=1)
  # Keys are rows here, so that both sums over queries are products whose
  # left side is in registers already.
  slopes = gpu_math.weights_of(logits, lse, axis=1)
  weights = slopes.astype(dtype)
  # Weights are needed once more, for d_value, without the cap's slope: a copy
  # in 16 bits is kept of them, not of both in 32.
  slopes = task.slopes_of(slopes, logits)
  plgpu.barrier_wait(channels[1].ready.at[slot])
  d_value, d_weights = gpu_registers.accumulate_and_product(
      d_value, (weights, d_out), (value, d_out.transpose((1, 0)))
  )
  delta = gpu_registers.load_vector(delta, axis=1)
  plgpu.commit_smem()  # Ordinary reads come before TMA writes anew.
  plgpu.barrier_arrive(channels[1].free.at[slot])
  d_logits = gpu_math.d_products(slopes, d_weights, delta, axis=1)
  d_key = gpu_registers.accumulate(d_key, d_logits.astype(dtype), query)
  plgpu.barrier_arrive(channels[0].free.at[slot])
  return d_key, d_value
