"""What each key gets on a GPU: keys stay and queries stream.

col_mass_s = sum_t row_weights_t exp(logits_ts - lse_t), from the lse of a
forward pass: no one-pass softmax can give it, because what it has summed is
corrected row by row. One product a pair of tiles, half of the forward's.
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


def choose(limits: task_lib.Limits) -> gpu_layout.TileConfig:
  """Tiles for keys and values of that size."""
  return gpu_layout.TileConfig(
      block_q=math.gcd(limits.most_q, 128),
      block_kv=math.gcd(limits.most_kv, 128),
      num_stages=4 if limits.head_dim == 128 else 6,
  )


def smem_bytes(config: gpu_layout.TileConfig, head_dim: int) -> int:
  """Shared memory of a block: keys, sums, and the ring of queries."""
  row = 2 * head_dim
  # lse and row weights beside each query.
  ring = config.num_stages * config.block_q * (row + 8)
  return config.block_kv * (row + 4) + ring


def col_mass(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    lse: Float[Array, "B N T"],
    row_weights: Float[Array, "B N T"] | None,
    task: task_lib.Task,
) -> Float[Array, "B N S"]:
  """Sums the attention weights of each key over the queries.

  Args:
    query: bfloat16 or float16; H is 64 or 128.
    key: K divides N.
    lse: float32, from `forward.forward`.
    row_weights: float32 weight of each query; None is 1.
    task: Its lists are of query tiles, for each key tile.

  Raises:
    ValueError: If the tiles do not fit into shared memory.
  """
  config = task.config
  batch, _, num_heads, head_dim = query.shape
  num_keys = key.shape[1]
  gpu_layout.check_smem("col_mass", smem_bytes(config, head_dim), config)
  num_tiles = -(-num_keys // config.block_kv)
  # Padded rows weigh nothing.
  if row_weights is not None:
    row_weights = row_weights.astype(jnp.float32)
    row_weights = gpu_layout.pad_rows(row_weights, config.block_q, 0.0)
  shape = (batch, num_heads, num_tiles * config.block_kv)
  results = gpu_layout.launch(
      functools.partial(_kernel, task),
      "attention_col_mass",
      task.inputs_of(query, key)
      | {
          "lse": gpu_layout.log2_lse(lse, config.block_q),
          "row_weights": row_weights,
      },
      {"col_mass": manual_axes.struct(shape, jnp.float32)},
      _scratch(config, head_dim, query.dtype, row_weights is not None),
      {"batch": batch, "head": num_heads, "tile": num_tiles},
      config.block_kv // _ROWS,
  )
  return results["col_mass"][..., :num_keys]


def _scratch(
    config: gpu_layout.TileConfig,
    head_dim: int,
    dtype: jnp.dtype,
    has_weights: bool,
) -> dict[str, Any]:
  """Shared memory by name."""
  num_consumers, stages = config.block_kv // _ROWS, config.num_stages
  buffer = gpu_layout.tile_buffer
  rows = (plgpu.SMEM((stages, config.block_q), jnp.float32),)
  buffers = (buffer(stages, config.block_q, head_dim, dtype), *rows)
  buffers = (*buffers, *rows) if has_weights else buffers
  return {
      "ring": (
          buffers,
          *stream.barriers(stages, len(buffers), num_consumers),
      ),
      "key": buffer(num_consumers, _ROWS, head_dim, dtype),
      "key_ready": plgpu.Barrier(num_barriers=num_consumers),
      "sums": plgpu.SMEM((num_consumers, _ROWS), jnp.float32),
  }


def _kernel(
    task: task_lib.Task, refs: Mapping[str, Any], scratch: Mapping[str, Any]
) -> None:
  """One key tile under one query head."""
  config = task.config
  batch, head = lax.axis_index("batch"), lax.axis_index("head")
  tile, group = lax.axis_index("tile"), lax.axis_index("warpgroup")
  num_consumers = config.block_kv // _ROWS
  kv_head = lax.div(head, refs["query"].shape[2] // refs["key"].shape[2])
  walk = stream.walk_of(refs, batch, head, tile)
  ring = stream.Channel(*scratch["ring"])
  first_key = tile * config.block_kv + group * _ROWS
  rows = pl.ds(first_key, _ROWS)

  @pl.when(group == num_consumers)
  def _produce():
    gpu_registers.lend_registers(num_consumers)
    copy = functools.partial(_copy, refs, batch, head, ring, config.block_q)
    stream.produce(walk, (ring,), (copy,))
    stream.drain((ring,), walk.num_valid)

  @pl.when(group < num_consumers)
  def _consume():
    gpu_registers.borrow_registers(num_consumers)
    key, ready = scratch["key"].at[group], scratch["key_ready"].at[group]
    plgpu.copy_gmem_to_smem(refs["key"].at[batch, rows, kv_head], key, ready)
    plgpu.barrier_wait(ready)
    visit = functools.partial(
        _visit,
        key=key,
        ring=ring,
        task=task,
        allowed=task.allowed(refs, batch, first_key, query_axis=1),
    )
    # Keys are rows, so that sums over queries are sums along a row.
    sums = stream.consume(
        walk,
        config.num_stages,
        task.kinds,
        visit,
        gpu_registers.filled((_ROWS,), 0.0),
    )
    sums_ref = scratch["sums"].at[group]
    sums_ref[...] = sums
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(sums_ref, refs["col_mass"].at[batch, head, rows])
    plgpu.wait_smem_to_gmem(0)


def _copy(
    refs: Mapping[str, hw_types.Ref],
    batch: hw_types.Index,
    head: hw_types.Index,
    ring: stream.Channel,
    block_q: int,
    tile: hw_types.Index,
    slot: hw_types.Index,
    ready: hw_types.Barrier,
) -> None:
  """Orders the copies of a query tile and of its rows' numbers."""
  queries = pl.ds(tile * block_q, block_q)
  sources = [refs["query"].at[batch, queries, head]]
  for name in ("lse", "row_weights"):
    if name in refs:
      sources.append(refs[name].at[batch, head, queries])
  for source, buffer in zip(sources, ring.buffers, strict=True):
    plgpu.copy_gmem_to_smem(source, buffer.at[slot], ready)


def _visit(
    tile: Callable[[], hw_types.Index],
    slot: hw_types.Index,
    sums: jax.Array,
    *,
    is_partial: bool,
    key: hw_types.Ref,
    ring: stream.Channel,
    task: task_lib.Task,
    allowed: Callable[[hw_types.Index], jax.Array],
) -> jax.Array:
  """Adds the weights that one tile of queries gives to the keys."""
  query, lse, *row_weights = (buffer.at[slot] for buffer in ring.buffers)
  plgpu.barrier_wait(ring.ready.at[slot])
  logits = task.logits_of(gpu_registers.product(key, query.transpose((1, 0))))
  if is_partial:
    logits = jnp.where(allowed(tile()), logits, -jnp.inf)
  lse = gpu_registers.load_vector(lse, axis=1)
  weights = gpu_math.weights_of(logits, lse, axis=1)
  for ref in row_weights:
    factors = gpu_registers.load_vector(ref, axis=1)
    weights = weights * gpu_math.along(factors, weights.shape, 1)
  plgpu.commit_smem()  # Ordinary reads come before TMA writes anew.
  plgpu.barrier_arrive(ring.free.at[slot])
  return sums + weights.sum(axis=1)
