"""Attention of tiles on a GPU: out and lse, queries stay and keys stream.

FlashAttention-3 (https://arxiv.org/abs/2407.08608) over lists of tiles: the
lists come from a mask or from data, per head or shared. Letters as in
`attention`.
"""

from collections.abc import Callable, Mapping
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
# Below every logit, and finite: the difference of two of it is 0, not nan.
_LOWEST = -1e30


def choose(limits: task_lib.Limits) -> gpu_layout.TileConfig:
  """Tiles for keys and values of that size."""
  return gpu_layout.TileConfig(
      block_q=math.gcd(limits.most_q, 128),
      block_kv=math.gcd(limits.most_kv, 128),
      num_stages=3 if limits.head_dim == 128 else 4,
      # Else registers spill.
      is_alternating=not (limits.has_ids and limits.head_dim == 128),
  )


def smem_bytes(config: gpu_layout.TileConfig, head_dim: int) -> int:
  """Shared memory of a block: queries, lse, and the ring of keys and values."""
  row = 2 * head_dim
  stays = config.block_q * (row + 4)
  return stays + config.num_stages * 2 * config.block_kv * row


def forward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    sink_logits: Float[Array, "N"] | None,
    task: task_lib.Task,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
  """Computes out and lse.

  Args:
    query: bfloat16 or float16; H is 64 or 128.
    key: K divides N.
    value: As key.
    sink_logits: A logit per head without value, or None.
    task: Its lists are of key tiles, for each query tile.

  Raises:
    ValueError: If the tiles do not fit into shared memory.
  """
  config = task.config
  batch, num_queries, num_heads, head_dim = query.shape
  gpu_layout.check_smem("forward", smem_bytes(config, head_dim), config)
  num_tiles = -(-num_queries // config.block_q)
  if sink_logits is not None:
    sink_logits = sink_logits.astype(jnp.float32)
  lse_shape = (batch, num_heads, num_tiles * config.block_q)
  results = gpu_layout.launch(
      functools.partial(_kernel, task),
      "attention_forward",
      task.inputs_of(query, key) | {"value": value, "sink": sink_logits},
      {
          "out": manual_axes.struct(query.shape, query.dtype),
          "lse": manual_axes.struct(lse_shape, jnp.float32),
      },
      _scratch(config, head_dim, query.dtype),
      {"batch": batch, "head": num_heads, "tile": num_tiles},
      config.block_q // _ROWS,
  )
  return results["out"], results["lse"][..., :num_queries]


def _scratch(
    config: gpu_layout.TileConfig, head_dim: int, dtype: jnp.dtype
) -> dict[str, Any]:
  """Shared memory by name."""
  num_consumers, stages = config.block_q // _ROWS, config.num_stages
  buffer = gpu_layout.tile_buffer
  rings = {
      name: (
          (buffer(stages, config.block_kv, head_dim, dtype),),
          *stream.barriers(stages, 1, num_consumers),
      )
      for name in ("key", "value")
  }
  return rings | {
      "query": buffer(num_consumers, _ROWS, head_dim, dtype),
      "lse": plgpu.SMEM((num_consumers, _ROWS), jnp.float32),
      "query_ready": plgpu.Barrier(num_barriers=num_consumers),
      "turn": plgpu.Barrier(num_arrivals=num_consumers),
  }


def _kernel(
    task: task_lib.Task, refs: Mapping[str, Any], scratch: Mapping[str, Any]
) -> None:
  """One query tile of one head."""
  config, place = task.config, task_lib.place_of(task, refs)
  batch, head, _, group, num_consumers, walk, first_query = place
  key, value = (stream.Channel(*scratch[x]) for x in ("key", "value"))
  rows = pl.ds(first_query, _ROWS)

  @pl.when(group == num_consumers)
  def _produce():
    task_lib.produce_keys(place, refs, {"key": key, "value": value})

  @pl.when(group < num_consumers)
  def _consume():
    gpu_registers.borrow_registers(num_consumers)
    query = scratch["query"].at[group]
    ready = scratch["query_ready"].at[group]
    plgpu.copy_gmem_to_smem(refs["query"].at[batch, rows, head], query, ready)
    plgpu.barrier_wait(ready)
    # Two warpgroups take turns: one multiplies while the other exponentiates.
    take_turn = _turns(scratch["turn"], group, num_consumers, config)
    visit = functools.partial(
        _visit,
        query=query,
        key=key,
        value=value,
        take_turn=take_turn,
        task=task,
        allowed=task.allowed(refs, batch, first_query, query_axis=0),
    )
    # The second one begins a turn later, and the first one waits for it at the
    # end.
    pl.when(group == 1)(take_turn)
    carry = stream.consume(
        walk, config.num_stages, task.kinds, visit, _begin(refs, head, query)
    )
    pl.when(group == 0)(take_turn)
    out, lse = _finish(*carry)
    query[...] = out.astype(query.dtype)
    scratch["lse"].at[group][...] = lse
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(query, refs["out"].at[batch, rows, head])
    plgpu.copy_smem_to_gmem(
        scratch["lse"].at[group], refs["lse"].at[batch, head, rows]
    )
    plgpu.wait_smem_to_gmem(0)


def _turns(
    barrier: hw_types.Barrier,
    group: hw_types.Index,
    num_consumers: int,
    config: gpu_layout.TileConfig,
) -> Callable[[], None]:
  """A function that waits for the other warpgroup to come as far."""

  def take_turn() -> None:
    if num_consumers == 2 and config.is_alternating:
      plgpu.barrier_arrive(barrier)
      plgpu.barrier_wait(barrier)

  return take_turn


def _begin(
    refs: Mapping[str, hw_types.Ref], head: hw_types.Index, query: hw_types.Ref
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Sums over no key yet, in which the sink takes part."""
  num_rows, head_dim = query.shape
  highest = gpu_registers.filled((num_rows,), _LOWEST)
  total = gpu_registers.filled((num_rows,), 0.0)
  # A sink is a key whose value is 0: it joins maximum and sum, not out.
  if "sink" in refs:
    highest = jnp.maximum(highest, refs["sink"][head] * gpu_math.LOG2_E)
    total = total + 1.0
  return gpu_registers.filled((num_rows, head_dim), 0.0), highest, total


def _visit(
    tile: Callable[[], hw_types.Index],
    slot: hw_types.Index,
    carry: tuple[jax.Array, ...],
    *,
    is_partial: bool,
    query: hw_types.Ref,
    key: stream.Channel,
    value: stream.Channel,
    take_turn: Callable[[], None],
    task: task_lib.Task,
    allowed: Callable[[hw_types.Index], jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Takes one tile of keys into out, largest logit and sum."""
  out, highest, total = carry
  plgpu.barrier_wait(key.ready.at[slot])
  products = gpu_registers.product(
      query, key.buffers[0].at[slot].transpose((1, 0)), then=take_turn
  )
  plgpu.barrier_arrive(key.free.at[slot])
  logits = task.logits_of(products)
  if is_partial:
    logits = jnp.where(allowed(tile()), logits, -jnp.inf)
  weights, correction, highest, total = gpu_math.online_softmax(
      logits, highest, total
  )
  out = out * gpu_math.along(correction, out.shape, 0)
  # In the type of the matrix unit; the sum above was of float32.
  weights = weights.astype(query.dtype)
  # Exponentials come before the turn: the compiler may not move them past
  # it.
  out, highest, total, weights = lax.optimization_barrier(
      (out, highest, total, weights)
  )
  take_turn()
  plgpu.barrier_wait(value.ready.at[slot])
  out = gpu_registers.accumulate(out, weights, value.buffers[0].at[slot])
  plgpu.barrier_arrive(value.free.at[slot])
  return out, highest, total


def _finish(
    out: jax.Array, highest: jax.Array, total: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Divides; rows without any key have out 0 and lse -inf."""
  divisor = jnp.where(total > 0, total, 1.0)
  lse = highest / gpu_math.LOG2_E + jnp.log(divisor)
  lse = jnp.where(total > 0, lse, -jnp.inf)
  return out / gpu_math.along(divisor, out.shape, 0), lse
