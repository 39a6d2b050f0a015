"""Which blocks of keys each block of queries may read, chosen from data.

A `Selection` is a table of key blocks per head and query block, and a mask that
holds inside the blocks. It may depend on the data (heavy hitters, retrieval,
hierarchical pruning) and stays O(blocks): no T x S mask is ever made.

Letters: B batch, N query heads, T queries, S keys, R query blocks, C key
blocks, W width of the table.
"""

import dataclasses
import types

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8
import numpy as np

from kernels_pallas import array_types
from kernels_pallas import lists
from kernels_pallas import masks
from kernels_pallas import spans

# What a tile of queries and keys holds: no allowed pair, some, or all.
EMPTY, PARTIAL, FULL = 0, 1, 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Selection:
  """Query block r reads key blocks block_table[b, n, r, :num_valid[b, n, r]].

  Attributes:
    block_table: int32 [B, N, R, W], without repetitions among the valid ones.
      Entries past `num_valid` are ignored. B and N may be 1: shared; N may be
      the KV heads: shared by the query heads of a group.
    num_valid: int32 [B, N, R].
    mask: What is allowed inside the blocks; None allows all.
    block_q: Queries in a block; R = ceil(T / block_q).
    block_kv: Keys in a block; C = ceil(S / block_kv).
  """

  block_table: array_types.Leaf
  num_valid: array_types.Leaf
  mask: masks.Mask | None
  block_q: int = dataclasses.field(metadata={"static": True})
  block_kv: int = dataclasses.field(metadata={"static": True})


def tile_states(
    mask: masks.Mask | None,
    num_queries: int,
    num_keys: int,
    block_q: int,
    block_kv: int,
) -> Int8[masks.AnyArray, "*B R C"]:
  """Says of each tile whether the mask allows nothing, something or all in it.

  Never EMPTY where a pair is allowed, never FULL where one is forbidden; a tile
  may be PARTIAL though nothing in it is allowed. Positions past T or S are
  forbidden to none but the last tiles, which are PARTIAL at most when ragged.

  Args:
    mask: None allows all.
    num_queries: T.
    num_keys: S.
    block_q: Queries in a tile.
    block_kv: Keys in a tile.

  Returns:
    EMPTY, PARTIAL or FULL; a NumPy array for a mask known while tracing.
  """
  if mask is None:
    mask = masks.full(num_queries, num_keys)
  xp = masks.numpy_of_mask(mask)
  touches, covers = _spans_of_tiles(xp, mask, num_keys, block_q, block_kv)
  if mask.query_ids is not None:
    same, apart = _compare_ids(xp, mask, block_q, block_kv)
    ndim = max(same.ndim, covers.ndim)
    touches, covers, same, apart = (
        masks.to_rank(x, ndim) for x in (touches, covers, same, apart)
    )
    touches, covers = touches & ~apart, covers & same
  states = xp.where(covers, FULL, xp.where(touches, PARTIAL, EMPTY))
  return states.astype(xp.int8)


def from_mask(
    mask: masks.Mask,
    num_queries: int,
    num_keys: int,
    *,
    block_q: int,
    block_kv: int,
) -> Selection:
  """The tiles that a mask touches, shared by all heads.

  Args:
    mask: Spans and ids.
    num_queries: T.
    num_keys: S.
    block_q: Queries in a block.
    block_kv: Keys in a block.
  """
  states = tile_states(mask, num_queries, num_keys, block_q, block_kv)
  # One list for all heads, as the mask is one.
  states = states if states.ndim == 3 else states[None]
  return _select((states > EMPTY)[:, None], mask, block_q, block_kv)


def heavy_hitters(
    col_mass: Float[Array, "B N S"],
    mask: masks.Mask,
    *,
    num_queries: int,
    num_heavy: int,
    block_q: int,
    block_kv: int,
    always: masks.Mask | None = None,
) -> Selection:
  """The key blocks that got most attention, and those of `always`.

  Per head and query block: every tile that `always` touches (a window, sinks),
  and of the other tiles that `mask` touches the `num_heavy` whose keys have the
  largest total `col_mass`. The idea of H2O (https://arxiv.org/abs/2306.14048)
  on blocks, as a mask instead of an eviction.

  Args:
    col_mass: What each key received, from an attention op with
      `return_col_mass`; N may be the KV heads or 1.
    mask: What may be attended to at all; holds inside the blocks.
    num_queries: T.
    num_heavy: Blocks per query block beyond those of `always`.
    block_q: Queries in a block.
    block_kv: Keys in a block.
    always: Part of the mask that is kept whatever its mass; None keeps the
      block of each query block's own last position.

  Returns:
    A Selection whose table is as wide as `always` and `num_heavy` need, if
    `always` is known while tracing, else as wide as all key blocks.
  """
  num_keys = col_mass.shape[-1]
  sizes = (num_queries, num_keys, block_q, block_kv)
  if always is None:
    offset = num_keys - num_queries
    always = masks.sliding_window(
        num_queries, num_keys, window=1, offset=offset
    )
  allowed, kept = (
      states if states.ndim == 3 else states[None]
      for states in (tile_states(m, *sizes) for m in (mask, always))
  )
  # What is always kept takes no part in the choice of the heavy ones.
  kept = (kept > EMPTY) & (allowed > EMPTY)
  allowed = allowed > EMPTY
  padding = -num_keys % block_kv
  padded = jnp.pad(col_mass, ((0, 0), (0, 0), (0, padding)))
  block_mass = padded.reshape(*padded.shape[:2], -1, block_kv).sum(axis=-1)
  num_heavy = min(num_heavy, block_mass.shape[-1])
  heavy = _heaviest(block_mass, allowed & ~kept, num_heavy)
  chosen = heavy | kept[:, None]
  # The list's width is static, so it can be narrow only if `always` is known.
  width = None
  if isinstance(kept, np.ndarray):
    width = min(int(kept.sum(axis=-1).max()) + num_heavy, kept.shape[-1])
  return _select(chosen, mask, block_q, block_kv, width)


def by_query_head(selection: Selection, num_heads: int) -> Selection:
  """The selection with a list a query head, or one that all share.

  Args:
    selection: Its N may be the KV heads, whose groups then share a list.
    num_heads: Query heads.
  """
  given = selection.block_table.shape[1]
  if given in (1, num_heads):
    return selection
  repeat = lambda x: spans.numpy_of(x).repeat(x, num_heads // given, axis=1)
  return dataclasses.replace(
      selection,
      block_table=repeat(selection.block_table),
      num_valid=repeat(selection.num_valid),
  )


def check(selection: Selection, num_queries: int, num_keys: int) -> None:
  """Checks every entry of the table, see `lists.check`; for debugging.

  Raises:
    ValueError: If a valid entry is no block of the keys or is listed twice, or
      `num_valid` is out of range, and the values are known (no tracers).
  """
  num_blocks = -(-num_keys // selection.block_kv)
  lists.check(
      "block_table",
      selection.block_table,
      selection.num_valid,
      num_blocks,
      f"the {num_keys} keys have blocks 0 to {num_blocks - 1}",
      "lists block {twice} twice for one query block",
  )


def _heaviest(
    block_mass: jax.Array, may_be: masks.AnyArray, num_heavy: int
) -> jax.Array:
  """[B, N, R, C]: of the tiles that may be chosen the heaviest of each row."""
  # -1 is below every mass: a tile that may not be read is never chosen, even if
  # fewer than `num_heavy` may be.
  candidates = jnp.where(may_be[:, None], block_mass[:, :, None, :], -1.0)
  # Ranks, not a threshold: equal masses must not make the list longer.
  threshold_rank = jnp.argsort(
      jnp.argsort(-candidates, axis=-1, stable=True), axis=-1
  )
  heavy = (threshold_rank < num_heavy) & (candidates >= 0)
  return heavy


def _select(
    chosen: masks.AnyArray,
    mask: masks.Mask | None,
    block_q: int,
    block_kv: int,
    width: int | None = None,
) -> Selection:
  """Lists the chosen blocks in ascending order, [B, N, R, C] -> [.., W]."""
  xp = np if isinstance(chosen, np.ndarray) else jnp
  num_valid = chosen.sum(axis=-1).astype(xp.int32)
  if width is None:
    width = int(num_valid.max()) if xp is np else chosen.shape[-1]
  # Stable, so that both the chosen blocks and the others stay in order.
  order = xp.argsort(~chosen, axis=-1, stable=True).astype(xp.int32)
  return Selection(
      order[..., : max(width, 1)], num_valid, mask, block_q, block_kv
  )


def _spans_of_tiles(
    xp: types.ModuleType,
    mask: masks.Mask,
    num_keys: int,
    block_q: int,
    block_kv: int,
) -> tuple[masks.AnyArray, masks.AnyArray]:
  """[*B, R, C]: may a span hold a key of the tile, do spans hold them all?"""
  first_key = xp.arange(0, num_keys, block_kv, dtype=xp.int32)
  last_key = xp.minimum(first_key + block_kv, num_keys)
  # Reduced over the queries of a tile first, to O(R) numbers a span.
  lowest = _per_tile(xp, mask.starts, mask.stops, block_q, "hull start")
  highest = _per_tile(xp, mask.starts, mask.stops, block_q, "hull stop")
  last_start = _per_tile(xp, mask.starts, mask.stops, block_q, "last start")
  first_stop = _per_tile(xp, mask.starts, mask.stops, block_q, "first stop")
  # A tile is touched if some hull meets it, and covered if the intersection of
  # its queries' spans holds it: both are tests of two numbers.
  first, last = (
      masks.to_rank(edge, lowest.ndim + 1) for edge in (first_key, last_key)
  )
  touches = (lowest[..., None] < last) & (highest[..., None] > first)
  covers = (last_start[..., None] <= first) & (first_stop[..., None] >= last)
  # The ragged last tile holds keys that are none.
  covers = covers & (first + block_kv <= num_keys)
  return xp.any(touches, axis=-3), xp.any(covers, axis=-3)


def _per_tile(
    xp: types.ModuleType,
    starts: masks.AnyArray,
    stops: masks.AnyArray,
    block_q: int,
    what: str,
) -> masks.AnyArray:
  """Reduces [*B, P, T] over the queries of each tile to [*B, P, R]."""
  is_empty = starts >= stops
  big = np.iinfo(np.int32).max
  # An empty span widens no hull; a tile of queries with one is covered by no
  # tile of keys, as its last start is past all of them.
  value, fill, reduce = {
      "hull start": (xp.where(is_empty, big, starts), big, "min"),
      "hull stop": (xp.where(is_empty, 0, stops), 0, "max"),
      "last start": (xp.where(is_empty, big, starts), 0, "max"),
      "first stop": (xp.where(is_empty, 0, stops), big, "min"),
  }[what]
  padding = [(0, 0)] * (value.ndim - 1) + [(0, -value.shape[-1] % block_q)]
  value = xp.pad(value, padding, constant_values=fill)
  tiles = value.reshape(*value.shape[:-1], -1, block_q)
  return getattr(tiles, reduce)(axis=-1)


def _compare_ids(
    xp: types.ModuleType, mask: masks.Mask, block_q: int, block_kv: int
) -> tuple[masks.AnyArray, masks.AnyArray]:
  """[*B, R, C]: are all ids of the tile equal, can none be?"""
  query_low, query_high = _range(xp, mask.query_ids, block_q)
  key_low, key_high = _range(xp, mask.key_ids, block_kv)
  query_low, query_high = query_low[..., None], query_high[..., None]
  key_low, key_high = key_low[..., None, :], key_high[..., None, :]
  # Equal ranges of one id on both sides are equal ids everywhere; ranges that
  # do not overlap have no id in common. All else is left to the kernel.
  same = (
      (query_low == query_high) & (key_low == key_high) & (query_low == key_low)
  )
  apart = (query_high < key_low) | (query_low > key_high)
  return same, apart


def _range(
    xp: types.ModuleType, ids: masks.AnyArray, block: int
) -> tuple[masks.AnyArray, masks.AnyArray]:
  """Smallest and largest id of each block; the last one repeats its last id."""
  padding = [(0, 0)] * (ids.ndim - 1) + [(0, -ids.shape[-1] % block)]
  ids = xp.pad(ids, padding, mode="edge")
  blocks = ids.reshape(*ids.shape[:-1], -1, block)
  return blocks.min(axis=-1), blocks.max(axis=-1)
