"""What the TPU backward gives its kernel: arrays by tile, and their blocks.

Letters as in `backward`. A grid step is at (b, u, p, c): sequence, unit,
chunk of queries, tile of keys.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from kernels_pallas import masks
from kernels_pallas.attention import visits as visits_lib
from kernels_pallas.attention.tpu import backward_kernel as kernel_lib
from kernels_pallas.attention.tpu import backward_plan as plan_lib
from kernels_pallas.hardware import types as hw_types

_LANES = 128
_SMEM = pltpu.SMEM
# Where a block is, by the place of a step in the grid.
_BlockIndex = Callable[..., tuple[hw_types.Index, ...]]
_INT32_MIN = np.int32(np.iinfo(np.int32).min)


def by_tile(
    plan: plan_lib.Plan, x: Float[Array, "B N T H"]
) -> Float[Array, "B U G R block_q H"]:
  """Cuts queries, or what is as large, into tiles."""
  batch, _, _, head_dim = x.shape
  shape = (batch, plan.num_units, plan.heads, -1, plan.tiles.block_q, head_dim)
  return x.reshape(shape)


def by_row(
    plan: plan_lib.Plan, x: Float[Array, "B N T"]
) -> Float[Array, "B U G chunks r block_q"]:
  """Cuts a number a query into rows of a tile each."""
  x = _by_chunk(plan, x)
  batch, _, *rest = x.shape
  return x.reshape(batch, plan.num_units, plan.heads, *rest)


def lists_of(plan: plan_lib.Plan, columns: visits_lib.Visits) -> dict[str, Any]:
  """The lists to visit, and which of their entries lie in each chunk."""
  # Lists that are known stay NumPy, so that they become constants of the
  # program.
  xp = np if isinstance(columns.table, np.ndarray) else jnp
  table, num_full, num_valid = columns
  if plan.num_chunks == 1:
    edges = (xp.zeros_like(num_full), num_full, num_full, num_valid)
    ranges = xp.stack(edges, axis=-1)[..., None, :]
    return _as_lists(plan, table, ranges)
  entry = masks.to_rank(xp.arange(table.shape[-1]), table.ndim)
  is_full = entry < num_full[..., None]
  is_partial = (entry < num_valid[..., None]) & ~is_full
  edges = xp.arange(plan.num_chunks + 1) * plan.chunk
  is_before = table[..., None] < masks.to_rank(edges, table.ndim + 1)
  # Either part of a list is ascending: a chunk's entries are neighbours.
  full = (is_before & is_full[..., None]).sum(axis=-2)
  partial = (is_before & is_partial[..., None]).sum(axis=-2)
  partial = partial + num_full[..., None]
  edges = (full[..., :-1], full[..., 1:], partial[..., :-1], partial[..., 1:])
  return _as_lists(plan, table, xp.stack(edges, axis=-1))


def _as_lists(
    plan: plan_lib.Plan, table: masks.AnyArray, ranges: masks.AnyArray
) -> dict[str, Any]:
  """Lists [B, N, C, W] and ranges [B, N, C, chunks, 4], unit by unit."""
  ranges = _by_unit(plan, ranges.astype(np.int32)).swapaxes(3, 4)
  return {
      "table": jnp.asarray(_by_unit(plan, table)),
      "ranges": jnp.asarray(ranges),
  }


def spans_of(
    plan: plan_lib.Plan,
    spans: tuple[masks.AnyArray, masks.AnyArray],
    query_ids: masks.AnyArray | None,
    key_ids: masks.AnyArray | None,
) -> dict[str, Any]:
  """Spans and ids in rows of a tile each."""
  starts, stops = map(jnp.asarray, spans)
  # Minus 2^31 turns the kernel's signed comparison into an unsigned one, which
  # tests both ends of a span at once.
  offsets, lengths = (
      _by_chunk(plan, x + _INT32_MIN)
      for x in (-starts, jnp.maximum(stops - starts, 0))
  )
  if query_ids is not None and key_ids is not None:
    query_ids = _by_chunk(plan, jnp.asarray(query_ids))
    # A row a tile: the kernel turns it into a column once for all query tiles.
    by_key_tile = (key_ids.shape[0], -1, 1, plan.tiles.block_kv)
    key_ids = jnp.asarray(key_ids).reshape(by_key_tile)
  return {
      "offsets": offsets,
      "lengths": lengths,
      "query_ids": query_ids,
      "key_ids": key_ids,
  }


def blocks_of(
    plan: plan_lib.Plan, inputs: kernel_lib.Inputs
) -> kernel_lib.Inputs:
  """The block of each array that a grid step gets; None for None.

  Arrays whose first axes are 1 are shared by all sequences or units.
  """
  (block_q, block_kv), head_dim = plan.tiles, plan.sizes.head_dim
  # Queries depend on unit and chunk alone: their block stays in VMEM while the
  # innermost axis, tiles of keys, goes by.
  group, rows = plan.units_of_group, (plan.chunk, block_q)
  of_group = _placed(plan, lambda b, u, p, c: (b, u, 0, p, 0, 0))
  query = pl.BlockSpec((None, None, plan.heads, *rows, head_dim), of_group)
  statistics = pl.BlockSpec((None, None, plan.heads, None, *rows), of_group)
  key = pl.BlockSpec(
      (None, None, block_kv, head_dim),
      _placed(plan, lambda b, u, p, c: (b, u // group, c, 0)),
  )
  span = pl.BlockSpec(
      (None, plan.num_spans, None, *rows),
      _shared(plan, inputs.offsets, lambda b, u, p, c: (b, 0, p, 0, 0)),
  )
  return kernel_lib.Inputs(
      table=pl.BlockSpec(
          (None, None, None, *inputs.table.shape[3:]),
          _shared(plan, inputs.table, lambda b, u, p, c: (b, u, c, 0, 0)),
          memory_space=_SMEM,
      ),
      ranges=pl.BlockSpec(
          (None, None, None, None, *inputs.ranges.shape[4:]),
          _shared(plan, inputs.ranges, lambda b, u, p, c: (b, u, c, p, 0, 0)),
          memory_space=_SMEM,
      ),
      query=query,
      d_out=query,
      key=key,
      value=key,
      lse=statistics,
      delta=statistics,
      offsets=span,
      lengths=span,
      **_id_blocks(plan, inputs),
  )


def scratch_of(plan: plan_lib.Plan, dtype: jnp.dtype) -> list[hw_types.Buffer]:
  """Memory of the kernel, in the order of `kernel_lib.Scratch`."""
  (block_q, block_kv), head_dim = plan.tiles, plan.sizes.head_dim
  shapes = [
      pltpu.VMEM((plan.heads, plan.chunk, head_dim, block_q), jnp.float32),
      pltpu.VMEM((block_kv, head_dim), jnp.float32),
      pltpu.VMEM((block_kv, head_dim), jnp.float32),
      pltpu.VMEM((head_dim, block_kv), dtype),
  ]
  if plan.has_ids:
    shapes.append(pltpu.VMEM((block_kv, _LANES), jnp.int32))
  return shapes


def _id_blocks(
    plan: plan_lib.Plan, inputs: kernel_lib.Inputs
) -> dict[str, pl.BlockSpec | None]:
  if not plan.has_ids:
    return {"query_ids": None, "key_ids": None}
  block_q, block_kv = plan.tiles
  return {
      "query_ids": pl.BlockSpec(
          (None, None, plan.chunk, block_q),
          _shared(plan, inputs.query_ids, lambda b, u, p, c: (b, p, 0, 0)),
      ),
      "key_ids": pl.BlockSpec(
          (None, None, 1, block_kv),
          _shared(plan, inputs.key_ids, lambda b, u, p, c: (b, c, 0, 0)),
      ),
  }


def _placed(plan: plan_lib.Plan, index: _BlockIndex) -> _BlockIndex:
  """The index by (b, u, p, c), of a step of the plan's grid."""
  return lambda *step: index(*plan.place(*step))


def _shared(
    plan: plan_lib.Plan, array: jax.Array, index: _BlockIndex
) -> _BlockIndex:
  """Leaves those of b and u at 0 whose axis is 1."""
  # A product by 0 or 1, as index maps may not branch.
  own_batch, own_unit = (int(size != 1) for size in array.shape[:2])
  return _placed(
      plan, lambda b, u, p, c: index(b * own_batch, u * own_unit, p, c)
  )


def _by_chunk(plan: plan_lib.Plan, x: jax.Array) -> jax.Array:
  """[.., T] -> [.., chunks, r, block_q], padded by what is never visited."""
  block_q = plan.tiles.block_q
  padding = [(0, 0)] * x.ndim
  num_queries = plan.num_chunks * plan.chunk * block_q
  padding[-1] = (0, num_queries - x.shape[-1])
  x = jnp.pad(x, padding) if padding[-1][1] else x
  return x.reshape(*x.shape[:-1], plan.num_chunks, plan.chunk, block_q)


def _by_unit(plan: plan_lib.Plan, x: masks.AnyArray) -> masks.AnyArray:
  """[B, N, C, ..] -> [B, U, C, G, ..]; lists that heads share stay one."""
  batch, num_heads, *rest = x.shape
  heads = plan.heads if num_heads > 1 else 1
  return x.reshape(batch, num_heads // heads, heads, *rest).swapaxes(2, 3)
