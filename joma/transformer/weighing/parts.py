"""Some queries' rows of masks and selections.

Letters: T queries.
"""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from joma.transformer import hooks
from kernels_pallas import array_types
from kernels_pallas import masks


def filled(where: hooks.Where, length: int) -> hooks.Where:
  """Adds rows that see nothing, up to `length` queries."""
  if isinstance(where, masks.Mask):
    return _filled_mask(where, length)
  inner = where.mask
  more = length // where.block_q - where.block_table.shape[2]
  return dataclasses.replace(
      where,
      block_table=_longer(where.block_table, 2, more),
      num_valid=_longer(where.num_valid, 2, more),
      mask=None if inner is None else _filled_mask(inner, length),
  )


def rows_of(
    where: hooks.Where, start: Int[Array, ""], size: int
) -> hooks.Where:
  """Those of `size` queries from `start` on, a multiple of it."""
  cut = lambda x, axis, by=1: jax.lax.dynamic_slice_in_dim(
      x, start // by, size // by, axis
  )
  if isinstance(where, masks.Mask):
    return _of_mask(where, cut)
  block, inner = where.block_q, where.mask
  return dataclasses.replace(
      where,
      block_table=cut(where.block_table, 2, block),
      num_valid=cut(where.num_valid, 2, block),
      mask=None if inner is None else _of_mask(inner, cut),
  )


def _filled_mask(mask: masks.Mask, length: int) -> masks.Mask:
  more = length - mask.starts.shape[-1]
  last, ids = mask.starts.ndim - 1, mask.query_ids
  return masks.Mask(
      _longer(mask.starts, last, more),
      _longer(mask.stops, last, more),
      None if ids is None else _longer(ids, ids.ndim - 1, more),
      mask.key_ids,
  )


def _of_mask(mask: masks.Mask, cut: Callable[..., Array]) -> masks.Mask:
  last, ids = mask.starts.ndim - 1, mask.query_ids
  return masks.Mask(
      cut(mask.starts, last),
      cut(mask.stops, last),
      None if ids is None else cut(ids, ids.ndim - 1),
      mask.key_ids,
  )


def _longer(x: array_types.AnyArray, axis: int, more: int) -> Array:
  """Zeros behind an axis."""
  width = [(0, more if i == axis else 0) for i in range(x.ndim)]
  return jnp.pad(jnp.asarray(x), width)
