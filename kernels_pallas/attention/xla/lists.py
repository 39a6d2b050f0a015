"""Which tiles of keys each block of queries reads, and what is allowed there.

Letters as in `attention`.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int
import numpy as np

from kernels_pallas import masks
from kernels_pallas.attention.xla import layout as xla_layout


class TiledMask(NamedTuple):
  """A mask cut into blocks; the batch may be 1.

  Attributes:
    starts: int32 [B, P, R, block_q], as in `masks.Mask`.
    stops: As `starts`; padded by 0.
    query_ids: int32 [B, R, block_q] or None.
    key_ids: int32 [B, C, block_kv] or None.
  """

  starts: masks.AnyArray
  stops: masks.AnyArray
  query_ids: masks.AnyArray | None
  key_ids: masks.AnyArray | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lists:
  """Tiles of keys for each block of queries.

  Attributes:
    table: int32 [B, N, R, W] tiles; B and N may be 1.
    num_valid: int32 [B, N, R].
    is_full: bool [B, N, R]: the mask allows all of the listed tiles.
    mask: What is allowed inside the tiles.
    is_complete: Whether the mask forbids all tiles that are not listed.
    own: int32 [B, N, R, M, C]: 1 for what, of what is listed, each M-th of the
      queries reads; see `together`. None is all.
  """

  table: masks.AnyArray
  num_valid: masks.AnyArray
  is_full: masks.AnyArray
  mask: TiledMask
  is_complete: bool
  own: masks.AnyArray | None = None


def cut(mask: masks.Mask | None, layout: xla_layout.Layout) -> TiledMask:
  """Cuts a mask into blocks; None allows all keys, but not the padding."""
  if mask is None:
    mask = masks.full(layout.num_queries, layout.num_keys)
  blocks_q = (layout.num_rows, layout.block_q)
  blocks_kv = (layout.num_tiles, layout.block_kv)

  def tiles(
      x: masks.AnyArray, num_axes: int, blocks: tuple[int, int]
  ) -> masks.AnyArray:
    xp = np if isinstance(x, np.ndarray) else jnp
    x = x if x.ndim == num_axes else x[None]
    padding = blocks[0] * blocks[1] - x.shape[-1]
    x = xp.pad(x, [(0, 0)] * (num_axes - 1) + [(0, padding)])
    return x.reshape(*x.shape[:-1], *blocks)

  return TiledMask(
      tiles(mask.starts, 3, blocks_q),
      tiles(mask.stops.clip(max=layout.num_keys), 3, blocks_q),
      None if mask.query_ids is None else tiles(mask.query_ids, 2, blocks_q),
      None if mask.key_ids is None else tiles(mask.key_ids, 2, blocks_kv),
  )


def allowed(
    mask: TiledMask,
    batch: Int[Array, ""],
    row: Int[Array, ""],
    tiles: Int[Array, "W"],
    is_valid: Bool[Array, "W"],
    block_kv: int,
) -> Bool[Array, "T S"]:
  """What a block of queries may attend to in some tiles.

  Args:
    mask: From `cut`.
    batch: The sequence.
    row: The block of queries.
    tiles: Tiles of keys.
    is_valid: Which of the tiles count.
    block_kv: Keys in a tile.
  """
  pick = lambda x: jnp.asarray(x)[batch if x.shape[0] > 1 else 0]
  # No span holds the highest integer.
  first = jnp.where(is_valid, tiles * block_kv, np.iinfo(np.int32).max)
  offset = jnp.where(is_valid[:, None], jnp.arange(block_kv)[None], 0)
  # Positions of the gathered keys; entries that do not count are outside of all
  # spans.
  keys = (first[:, None] + offset).reshape(-1)
  starts, stops = (pick(x)[:, row, :, None] for x in (mask.starts, mask.stops))
  keys = jnp.asarray(masks.to_rank(keys, starts.ndim))
  inside = ((keys >= starts) & (keys < stops)).any(axis=0)
  if mask.query_ids is None:
    return inside
  key_ids = pick(mask.key_ids)[tiles].reshape(-1)
  return inside & (pick(mask.query_ids)[row][:, None] == key_ids[None])
