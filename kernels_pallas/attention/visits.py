"""Which tiles meet, in the order in which a kernel visits them.

A kernel walks, for each tile of one side, over a list of tiles of the other
side. Tiles that the mask allows wholly come first: they are computed without a
mask. Tiles that nothing is allowed in are in no list: they cost nothing.

Letters: B batch, N query heads (either may be 1: shared), R query tiles, C key
tiles, W width of the lists.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Int8
import numpy as np

from kernels_pallas import masks
from kernels_pallas import selection as selection_lib


class Visits(NamedTuple):
  """Lists of tiles to visit; NumPy arrays where they are known while tracing.

  Attributes:
    table: int32 [B, N, rows, W]: tiles of the other side. Entries past
      `num_valid` repeat the last valid one (or are 0 if there is none).
    num_full: int32 [B, N, rows]: the first so many entries need no mask.
    num_valid: int32 [B, N, rows]: the first so many entries are to be visited.
  """

  table: masks.AnyArray
  num_full: masks.AnyArray
  num_valid: masks.AnyArray


def by_query(
    states: Int8[masks.AnyArray, "B N R C"], width: int | None = None
) -> Visits:
  """Lists the key tiles of each query tile.

  Args:
    states: EMPTY, PARTIAL or FULL, from `states_of`.
    width: Static bound of the lists' length; None takes the longest list of
      states known while tracing, else C.
  """
  return _list(states, width)


def by_key(
    states: Int8[masks.AnyArray, "B N R C"], width: int | None = None
) -> Visits:
  """Lists the query tiles of each key tile: the transposed lists."""
  return _list(states.swapaxes(-1, -2), width)


def states_of(
    where: masks.Mask | selection_lib.Selection | None,
    num_queries: int,
    num_keys: int,
    block_q: int,
    block_kv: int,
) -> Int8[masks.AnyArray, "B N R C"]:
  """States of all tiles under a mask (N is 1) or a selection.

  Args:
    where: What may be attended to. A selection must have these block sizes.
    num_queries: T.
    num_keys: S.
    block_q: Queries in a tile.
    block_kv: Keys in a tile.
  """
  is_selection = isinstance(where, selection_lib.Selection)
  mask = where.mask if is_selection else where
  states = selection_lib.tile_states(
      mask, num_queries, num_keys, block_q, block_kv
  )
  states = (states if states.ndim == 3 else states[None])[:, None]
  if not is_selection:
    return states
  return states * selected(where, states.shape[-1])


def width_of(where: masks.Mask | selection_lib.Selection | None) -> int | None:
  """The static bound of `by_query`'s lists, None if there is none."""
  if isinstance(where, selection_lib.Selection):
    return where.block_table.shape[-1]
  return None


def selected(
    selection: selection_lib.Selection, num_tiles: int
) -> Int8[masks.AnyArray, "B N R C"]:
  """Returns 1 for the tiles that the table lists, of C."""
  table, num_valid = selection.block_table, selection.num_valid
  is_known = isinstance(table, np.ndarray) and isinstance(num_valid, np.ndarray)
  xp = np if is_known else jnp
  entry = masks.to_rank(xp.arange(table.shape[-1]), table.ndim)
  is_valid = entry < num_valid[..., None]
  tiles = masks.to_rank(xp.arange(num_tiles), table.ndim + 1)
  # [.., W, C] reduced over W: fused by XLA, never in memory.
  listed = (table[..., None] == tiles) & is_valid[..., None]
  return listed.any(axis=-2).astype(xp.int8)


def _list(states: masks.AnyArray, width: int | None) -> Visits:
  xp = np if isinstance(states, np.ndarray) else jnp
  num_full = (states == selection_lib.FULL).sum(axis=-1).astype(xp.int32)
  num_valid = (states > selection_lib.EMPTY).sum(axis=-1).astype(xp.int32)
  # Known lists are as narrow as their longest; of traced ones the bound is C.
  if xp is np:
    width = int(num_valid.max(initial=0))
  elif width is None:
    width = states.shape[-1]
  width = max(width, 1)
  # FULL = 2 before PARTIAL = 1 before EMPTY = 0, each in ascending order.
  order: Any = xp.argsort(-states, axis=-1, stable=True).astype(xp.int32)
  # Past its end a list repeats its last tile, so that copies made ahead are of
  # a tile that is there.
  last = xp.maximum(num_valid - 1, 0)[..., None]
  position: Any = xp.minimum(masks.to_rank(xp.arange(width), last.ndim), last)
  table: Any = xp.take_along_axis(order, position, axis=-1)
  table = xp.where(num_valid[..., None] > 0, table, 0).astype(xp.int32)
  return Visits(table, num_full, num_valid)
