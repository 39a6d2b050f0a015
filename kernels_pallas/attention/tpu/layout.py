"""How attention lies in the memory of a TPU: tiles, spans and lists.

Letters as in `forward`; R query tiles.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Int
import numpy as np

from kernels_pallas import masks
from kernels_pallas.attention import visits as visits_lib
from kernels_pallas.hardware import tpu_layout
from kernels_pallas.hardware import types as hw_types


class Sizes(NamedTuple):
  """Sizes of an attention: B, N, K, T, S, H, and bytes of an element."""

  batch: int
  num_heads: int
  num_kv_heads: int
  num_queries: int
  num_keys: int
  head_dim: int
  itemsize: int


class Tiles(NamedTuple):
  """Queries and keys of a tile, and how many lanes the queries take."""

  block_q: int
  block_kv: int

  @property
  def lanes_q(self) -> int:
    """Queries of a tile in memory: multiples of the 128 lanes."""
    return tpu_layout.round_up(self.block_q, tpu_layout.LANES)

  @property
  def area(self) -> int:
    """Logits of a tile in memory."""
    return self.lanes_q * self.block_kv


class Spans(NamedTuple):
  """The mask inside partial tiles, padded as queries and keys are.

  Attributes:
    starts: int32 [B or 1, P, T].
    stops: int32 [B or 1, P, T]; start >= stop for padding.
    query_ids: int32 [B or 1, T], or None.
    key_ids: int32 [B or 1, S], or None.
    are_from_0: Whether all spans are known to start at the first key.
  """

  starts: Int[Array, "B P T"]
  stops: Int[Array, "B P T"]
  query_ids: Int[Array, "B T"] | None = None
  key_ids: Int[Array, "B S"] | None = None
  are_from_0: bool = False


def sizes_of(query: jax.Array, key: jax.Array) -> Sizes:
  """Sizes of query [B, T, N, H] and key [B, S, K, H].

  Raises:
    ValueError: If a TPU has no such type.
  """
  if query.dtype not in (jnp.float32, jnp.bfloat16):
    raise ValueError(
        f"query, key and value are {query.dtype}; the TPU kernels take float32"
        " and bfloat16"
    )
  batch, num_queries, num_heads, head_dim = query.shape
  return Sizes(
      batch,
      num_heads,
      key.shape[2],
      num_queries,
      key.shape[1],
      head_dim,
      query.dtype.itemsize,
  )


def pad_queries(
    x: masks.AnyArray, axis: int, tiles: Tiles, fill: int | float = 0
) -> Array:
  """Pads each tile of queries along an axis to whole lanes."""
  x = tpu_layout.pad(jnp.asarray(x), axis, tiles.block_q, fill)
  if tiles.lanes_q == tiles.block_q:
    return x
  axis %= x.ndim
  # Each tile is padded by itself: query t stays in tile t // block_q.
  before, after = x.shape[:axis], x.shape[axis + 1 :]
  x = x.reshape(*before, -1, tiles.block_q, *after)
  x = tpu_layout.pad(x, axis + 1, tiles.lanes_q, fill)
  return x.reshape(*before, -1, *after)


def unpad_queries(x: Array, axis: int, tiles: Tiles, num: int) -> Array:
  """Undoes `pad_queries`."""
  axis %= x.ndim
  if tiles.lanes_q != tiles.block_q:
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    x = x.reshape(*before, -1, tiles.lanes_q, *after)
    x = jax.lax.slice_in_dim(x, 0, tiles.block_q, axis=axis + 1)
    x = x.reshape(*before, -1, *after)
  return jax.lax.slice_in_dim(x, 0, num, axis=axis)


def pad_keys(x: masks.AnyArray, axis: int, tiles: Tiles) -> Array:
  """Pads the keys along an axis to whole tiles."""
  return tpu_layout.pad(jnp.asarray(x), axis, tiles.block_kv, 0)


def spans_of(mask: masks.Mask | None, sizes: Sizes, tiles: Tiles) -> Spans:
  """The spans and ids of a mask, with a batch axis and padded."""
  if mask is None:
    mask = masks.full(sizes.num_queries, sizes.num_keys)
  starts, stops = (
      jnp.asarray(x if x.ndim == 3 else x[None])
      for x in (mask.starts, mask.stops)
  )
  # Padded keys are none, whatever a mask made from data says.
  stops = jnp.minimum(stops, sizes.num_keys)
  spans = (pad_queries(x, -1, tiles) for x in (starts, stops))
  are_from_0 = isinstance(mask.starts, np.ndarray) and not mask.starts.any()
  query_ids = key_ids = None
  if mask.query_ids is not None:
    query_ids, key_ids = (
        x if x.ndim == 2 else x[None] for x in (mask.query_ids, mask.key_ids)
    )
    query_ids = pad_queries(query_ids, -1, tiles)
    key_ids = pad_keys(key_ids, -1, tiles)
  starts, stops = spans
  return Spans(starts, stops, query_ids, key_ids, bool(are_from_0))


def pack(rows: visits_lib.Visits) -> Int[Array, "B N R 1 _"]:
  """num_full, num_valid and the list of each row, for one copy to SMEM."""
  # One array, because each copy to scalar memory has a latency of its own.
  counts = (rows.num_full[..., None], rows.num_valid[..., None])
  packed = jnp.concatenate([*counts, rows.table], axis=-1)
  return packed[..., None, :].astype(jnp.int32)


def list_block(lists: jax.Array, row: Callable[[Any], Any]) -> pl.BlockSpec:
  """The list of one row, in SMEM: tables of any size fit."""
  # A mask without a batch has one list for all, which is fetched once.
  shared_batch, shared_heads = (size == 1 for size in lists.shape[:2])

  def index(
      b: hw_types.Index, n: hw_types.Index, r: hw_types.Index
  ) -> tuple[hw_types.Index, ...]:
    return (0 if shared_batch else b, 0 if shared_heads else n, row(r), 0, 0)

  block = (1, 1, 1, *lists.shape[3:])
  return pl.BlockSpec(block, index, memory_space=pltpu.SMEM)


def span_blocks(
    spans: Spans, tiles: Tiles, *, by_key: bool = False
) -> dict[str, tuple[Any, pl.BlockSpec]]:
  """Spans and ids by name, for a grid over heads and tiles.

  Args:
    spans: Padded.
    tiles: Block sizes.
    by_key: Whether the last axis of the grid is over tiles of keys: then the
      kernel gets all queries and the ids of one tile of keys.
  """
  blocks = {"stops": spans.stops}
  if not spans.are_from_0:
    blocks["starts"] = spans.starts
  if spans.query_ids is not None and spans.key_ids is not None:
    blocks["query_ids"] = spans.query_ids[:, None]
    by_tile = (spans.key_ids.shape[0], -1, 1, tiles.block_kv)
    blocks["key_ids"] = spans.key_ids.reshape(by_tile)
  return {
      name: (array, _span_block(name == "key_ids", array, tiles, by_key))
      for name, array in blocks.items()
  }


def _span_block(
    is_key: bool, array: jax.Array, tiles: Tiles, by_key: bool
) -> pl.BlockSpec:
  is_shared = array.shape[0] == 1
  block = list(array.shape)
  block[0] = 1
  if is_key == by_key:  # A tile at a time; else all of them.
    block[1 if is_key else 2] = 1 if is_key else tiles.lanes_q

  def index(
      b: hw_types.Index, n: hw_types.Index, tile: hw_types.Index
  ) -> tuple[hw_types.Index, ...]:
    del n
    tile = tile if is_key == by_key else 0
    return (0 if is_shared else b, *((tile, 0, 0) if is_key else (0, tile)))

  return pl.BlockSpec(tuple(block), index)
