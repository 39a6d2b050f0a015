"""Lists of tiles on a TPU: of data they are made without a sort or a gather.

What is known while tracing becomes constants, by `visits`. Of data, an entry's
place in its list is the number of entries that come before it, and a list is
the sum of all entries, each times whether its place is this one: comparisons
and sums over small axes, which XLA fuses, where sorts and gathers of numbers
take the scalar path.

Letters as in `visits`: R query tiles, C key tiles, W width of a table.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int
import numpy as np

from kernels_pallas import masks
from kernels_pallas import selection as selection_lib
from kernels_pallas.attention import differentiable
from kernels_pallas.attention import visits as visits_lib
from kernels_pallas.attention.tpu import layout

# Of a row of states known while tracing: with more, each tile is looked up.
_MOST_CHANGES = 16
# Lists from which on products take less than sums.
_WIDE = 48


def by_query(
    where: differentiable.Where, sizes: layout.Sizes, tiles: layout.Tiles
) -> visits_lib.Visits:
  """The key tiles of each query tile, see `visits.by_query`."""
  where = _whole_blocks(where, tiles)
  if isinstance(where, selection_lib.Selection) and isinstance(
      where.block_table, jax.Array
  ):
    return _of_table(where, sizes, tiles)
  states = states_of(where, sizes, tiles)
  if isinstance(states, np.ndarray):
    return visits_lib.by_query(states, visits_lib.width_of(where))
  return _of_states(states, visits_lib.width_of(where))


def by_key(
    where: differentiable.Where, sizes: layout.Sizes, tiles: layout.Tiles
) -> visits_lib.Visits:
  """The query tiles of each key tile, see `visits.by_key`."""
  states = states_of(where, sizes, tiles)
  if isinstance(states, np.ndarray):
    return visits_lib.by_key(states)
  return _of_states(states.swapaxes(-1, -2), None)


def states_of(
    where: differentiable.Where, sizes: layout.Sizes, tiles: layout.Tiles
) -> Int[masks.AnyArray, "B N R C"]:
  """States of all tiles, see `visits.states_of`."""
  where = _whole_blocks(where, tiles)
  return visits_lib.states_of(where, *sizes[3:5], *tiles)


def _whole_blocks(
    where: differentiable.Where, tiles: layout.Tiles
) -> differentiable.Where:
  """A block of all keys is as long as they are when padded."""
  if not isinstance(where, selection_lib.Selection):
    return where
  return dataclasses.replace(where, block_kv=tiles.block_kv)


def _of_table(
    selection: selection_lib.Selection,
    sizes: layout.Sizes,
    tiles: layout.Tiles,
) -> visits_lib.Visits:
  """The lists of a table that depends on data, entry by entry."""
  table = jnp.asarray(selection.block_table, jnp.int32)
  width = table.shape[-1]
  entry = masks.to_rank(_numbers(width), table.ndim)
  states = selection_lib.tile_states(selection.mask, *sizes[3:5], *tiles)
  states = (states if states.ndim == 3 else states[None])[:, None]
  is_there = (table >= 0) & (table < states.shape[-1])
  is_there &= entry < jnp.asarray(selection.num_valid)[..., None]
  # A tile that is listed twice counts once, as where tables are known.
  same = (table[..., None] == table[..., None, :]) & is_there[..., None, :]
  is_twice = (same & _is_before(width, same.ndim)).any(axis=-1)
  state = _state_of(states, table) * (is_there & ~is_twice)
  return _listed(state, table, width)


def _of_states(
    states: Int[Array, "B N R C"], width: int | None
) -> visits_lib.Visits:
  """The lists of all states, of which `width` at most are not empty."""
  tile = masks.to_rank(_numbers(states.shape[-1]), states.ndim)
  width = min(width or states.shape[-1], states.shape[-1])
  return _listed(states, tile, width)


def _listed(
    states: Int[Array, "B N R W"],
    tile: Int[masks.AnyArray, "#B #N #R W"],
    width: int,
) -> visits_lib.Visits:
  """Lists whole tiles, then partial ones, of which there are `width` at most.

  Wide lists keep the order of `tile`: that of a selection's table is its own.
  """
  is_full = states == selection_lib.FULL
  is_valid = states > selection_lib.EMPTY
  num_full = is_full.sum(axis=-1, dtype=jnp.int32)
  num_valid = is_valid.sum(axis=-1, dtype=jnp.int32)
  if width > _WIDE:
    # Running counts by a product with a triangle: zeros and ones are exact.
    kinds = jnp.stack([is_full, is_valid & ~is_full]).astype(jnp.float32)
    triangle = np.triu(np.ones((states.shape[-1],) * 2, np.float32), 1)
    full, partial = (kinds @ triangle).astype(jnp.int32)
    place = jnp.where(is_full, full, num_full[..., None] + partial)
  else:
    # Whole tiles first, then by number: what has a smaller key comes before.
    key = tile + (1 << 24) * ~is_full
    is_before = key[..., None, :] < key[..., None]
    place = (is_before & is_valid[..., None, :]).sum(axis=-1)
  place = jnp.where(is_valid, place, -1)
  if width > _WIDE:
    table = _by_product(place, tile, width)
  else:
    # Past its end a list repeats its last tile.
    slot = masks.to_rank(_numbers(width), place.ndim)
    slot = jnp.minimum(slot, jnp.maximum(num_valid - 1, 0)[..., None])
    is_here = place[..., None, :] == slot[..., None]
    table = jnp.where(is_here, tile[..., None, :], 0).sum(axis=-1)
    return visits_lib.Visits(table.astype(jnp.int32), num_full, num_valid)
  slot = masks.to_rank(_numbers(width), table.ndim)
  last = jnp.where(slot == num_valid[..., None] - 1, table, 0).sum(axis=-1)
  table = jnp.where(slot < num_valid[..., None], table, last[..., None])
  return visits_lib.Visits(table.astype(jnp.int32), num_full, num_valid)


def _by_product(
    place: Int[Array, "B N R W"],
    tile: Int[masks.AnyArray, "#B #N #R W"],
    width: int,
) -> Int[Array, "B N R width"]:
  """Tiles by their places, of long lists: by the two digits of a place.

  A place is right where both digits are, and the sum over tiles of products is
  one of matrices. Numbers of tiles are cut at 8 bits, exact in bfloat16.
  """
  base = 1 << (max(width - 1, 1).bit_length() + 1) // 2
  digit = masks.to_rank(_numbers(base), place.ndim)[..., None]
  # A place of -1 has no digits: a shift leaves it negative.
  high = (place // base)[..., None, :] == digit
  low = (place % base)[..., None, :] == digit
  xp = np if isinstance(tile, np.ndarray) else jnp
  parts = xp.stack([tile & 255, tile >> 8], axis=-2).astype(np.float32)
  weighed = high[..., None, :, :] * parts[..., :, None, :]
  found = jnp.einsum(
      "...ahw,...lw->...ahl",
      weighed,
      low.astype(jnp.float32),
      preferred_element_type=jnp.float32,
  )
  lower, upper = (
      found[..., i, :, :].reshape(*place.shape[:-1], base * base)
      for i in range(2)
  )
  table = lower + 256 * upper
  return table[..., :width].astype(jnp.int32)


def _state_of(
    states: Int[masks.AnyArray, "#B #N R C"], table: Int[Array, "#B #N R W"]
) -> Int[Array, "#B #N R W"]:
  """The state of each tile that a table names."""
  edges: Any = None
  if isinstance(states, np.ndarray):
    edges = _changes(states)
  if edges is None:
    tiles = masks.to_rank(_numbers(states.shape[-1]), table.ndim + 1)
    is_it = table[..., None] == tiles
    return jnp.where(is_it, states[..., None, :], 0).sum(axis=-1)
  state: Any = jnp.zeros_like(table) + states[..., :1].astype(np.int32)
  # A row of states has few steps: it is the sum of those before the tile.
  for at, step in edges:
    state = state + jnp.where(table >= at, step, 0)
  return state


def _is_before(size: int, ndim: int) -> masks.AnyArray:
  """Bool [.., size, size]: whether a column's entry is before the row's."""
  return masks.to_rank(np.tri(size, k=-1, dtype=bool), ndim)


def _numbers(size: int) -> np.ndarray:
  """0, 1, ..: a constant, where XLA would make an operation of a range."""
  return np.arange(size, dtype=np.int32)


def _changes(
    states: Int[np.ndarray, "B N R C"],
) -> list[tuple[np.ndarray, np.ndarray]] | None:
  """Where the states of each row change and by how much, if seldom."""
  steps = np.diff(states.astype(np.int32), axis=-1)
  num = int((steps != 0).sum(axis=-1).max(initial=0))
  if num > _MOST_CHANGES:
    return None
  # Changes first, in order; what pads a short row is 0.
  order = np.argsort(steps == 0, axis=-1, kind="stable")[..., :num]
  steps = np.take_along_axis(steps, order, axis=-1)
  return [
      (order[..., i : i + 1] + 1, steps[..., i : i + 1]) for i in range(num)
  ]
