"""Scores of pages in the registers of a TPU: a page a sublane, and in a row.

Copies put each page into a sublane of its own, [pages, S]; logits of a block of
pages are one row, [1, L]. Where a page is less than the 128 lanes, several
share a register of the row.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from kernels_pallas.hardware import tpu_layout

_LANES = tpu_layout.LANES
_SUBLANES = 8


def to_row(pages: Shaped[Array, "m S"]) -> Shaped[Array, "1 L"]:
  """Pages one after the other along the lanes; m is a multiple of 8."""
  num, size = pages.shape
  if size >= _LANES:
    return jnp.concatenate([pages[m : m + 1] for m in range(num)], axis=1)
  shared = _LANES // size
  wide = jnp.concatenate(shared * [pages], axis=1)
  rows = []
  for first in range(0, num, shared):
    tile = first // _SUBLANES * _SUBLANES
    own = _is_own(shared, first - tile)
    kept = jnp.where(own, wide[tile : tile + _SUBLANES], 0)
    rows.append(kept.sum(axis=0, keepdims=True))
  return jnp.concatenate(rows, axis=1)


def to_pages(row: Shaped[Array, "1 L"], size: int) -> Shaped[Array, "m S"]:
  """Undoes `to_row` for pages of `size` slots."""
  num = row.shape[1] // size
  if size >= _LANES:
    parts = (row[:, m * size : (m + 1) * size] for m in range(num))
    return jnp.concatenate(list(parts))
  shared = _LANES // size
  tiles = []
  for tile in range(0, num, _SUBLANES):
    wide = jnp.zeros((_SUBLANES, _LANES), row.dtype)
    for first in range(0, _SUBLANES, shared):
      lanes = (tile + first) * size
      part = jnp.broadcast_to(row[:, lanes : lanes + _LANES], wide.shape)
      wide = jnp.where(_is_own(shared, first), part, wide)
    parts = [wide[:, i * size : (i + 1) * size] for i in range(shared)]
    tiles.append(sum(parts[1:], parts[0]))
  return jnp.concatenate(tiles)


def _is_own(shared: int, first: int) -> Array:
  """Which lanes of sublane `first` + i are the i-th of the `shared` parts."""
  iota = lambda axis: jax.lax.broadcasted_iota(
      jnp.int32, (_SUBLANES, _LANES), axis
  )
  return iota(0) == first + iota(1) // (_LANES // shared)
