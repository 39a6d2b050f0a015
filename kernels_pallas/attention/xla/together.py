"""Selections whose blocks have few queries: several blocks make one strip.

A query that reads its own blocks of keys leaves a product of one row for each
of them, and copies the keys for it. A strip of many such queries reads what any
of them lists, once, as a product of many rows; `Lists.own` says which of the
tiles each of its blocks reads.

Letters as in `layout`; W width of the table, M blocks that make a strip.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int
import numpy as np

from kernels_pallas import masks
from kernels_pallas import selection as selection_lib
from kernels_pallas.attention import visits

# How many times more tiles a strip may read than a block lists: by measurement
# on two cores of an AMD EPYC, a row of a large product takes so much less.
MOST_TILES = 8
# Entries of a list that are compared with each tile to find `own_tiles`, by the
# keys of a tile: few beside the products with those keys.
_COMPARED = 64


def num_blocks(
    where: selection_lib.Selection, num_tiles: int, group: int, num_rows: int
) -> int:
  """M: blocks of queries to put into a strip, 1 where that does not pay.

  Args:
    where: The selection.
    num_tiles: C.
    group: G.
    num_rows: Rows that a strip should have.
  """
  num_blocks_q, width = where.block_table.shape[2:]
  if num_tiles > MOST_TILES * width or width > _COMPARED * where.block_kv:
    return 1
  return min(max(num_rows // (group * where.block_q), 1), num_blocks_q)


def own_tiles(
    where: selection_lib.Selection, num_tiles: int, together: int
) -> Int[masks.AnyArray, "B N R M C"]:
  """Returns 1 for the tiles of keys that each block of a strip reads."""
  table = where.block_table
  is_known = isinstance(table, np.ndarray) and isinstance(
      where.num_valid, np.ndarray
  )
  xp = np if is_known else jnp
  own = visits.selected(where, num_tiles).astype(np.int32)
  padding = -table.shape[2] % together
  own = xp.pad(own, ((0, 0), (0, 0), (0, padding), (0, 0)))
  return own.reshape(*own.shape[:2], -1, together, num_tiles)


def lists(
    own: Int[masks.AnyArray, "B N R M C"],
) -> tuple[Int[masks.AnyArray, "B N R C"], Int[masks.AnyArray, "B N R"]]:
  """The tiles that any block of a strip reads, in order, and how many.

  By sums and comparisons: a sort of them ends the compiler for a TPU v7x.
  """
  xp = np if isinstance(own, np.ndarray) else jnp
  read = own.max(axis=-2)
  tiles = xp.arange(own.shape[-1], dtype=np.int32)
  place = xp.where(read > 0, xp.cumsum(read, axis=-1) - 1, -1)
  is_here = place[..., None, :] == masks.to_rank(tiles, read.ndim)[..., None]
  table = xp.where(is_here, tiles, 0).sum(axis=-1, dtype=np.int32)
  return table, read.sum(axis=-1, dtype=np.int32)


def allowed(
    own: Int[Array, "M C"], tiles: Int[Array, "W"], block_q: int, block_kv: int
) -> Bool[Array, "T S"]:
  """What each query of a strip reads of the keys that the strip reads.

  Args:
    own: Of its blocks.
    tiles: That the strip reads.
    block_q: Queries of a block, of which the strip has M.
    block_kv: Keys of a tile.
  """
  read = own[:, tiles].repeat(block_kv, axis=1)
  return read.repeat(block_q, axis=0) > 0
