"""Arithmetic of spans of keys, of NumPy arrays and of jax's alike.

Letters as in `masks`: T queries, P spans a query, B batch (may be absent).
"""

from collections.abc import Sequence
import types

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.array_types import AnyArray


def to_rank(array: AnyArray, ndim: int) -> AnyArray:
  """Adds leading axes of size 1, so that nothing is promoted silently."""
  return array.reshape((1,) * (ndim - array.ndim) + array.shape)


def numpy_of(
    *arrays: AnyArray | np.integer | Sequence[int] | int,
) -> types.ModuleType:
  """NumPy where all are known while tracing, else jax.numpy."""
  known = (int, np.integer, np.ndarray, Sequence)
  return np if all(isinstance(a, known) for a in arrays) else jnp


def broadcast(one: AnyArray, two: AnyArray) -> tuple[AnyArray, AnyArray]:
  """Gives both [*B, P, T] arrays the batch axes of both."""
  ndim = max(one.ndim, two.ndim)
  one, two = to_rank(one, ndim), to_rank(two, ndim)
  lead = np.broadcast_shapes(one.shape[:-2], two.shape[:-2])
  xp = numpy_of(one, two)
  full = lambda x: xp.broadcast_to(x, lead + x.shape[-2:])
  return full(one), full(two)


def disjoint(
    xp: types.ModuleType, starts: AnyArray, stops: AnyArray
) -> tuple[AnyArray, AnyArray]:
  """Orders two spans by their start and joins them where they touch."""
  is_empty = starts >= stops
  # Empty spans sort last, whatever their numbers were.
  starts = xp.where(is_empty, xp.iinfo(xp.int32).max, starts)
  order = xp.argsort(starts, axis=-2)
  starts = xp.take_along_axis(starts, order, axis=-2)
  stops = xp.take_along_axis(stops, order, axis=-2)
  (a0, a1), (b0, b1) = ((starts[..., i, :], stops[..., i, :]) for i in range(2))
  # Spans that overlap become one: a key in both would count twice.
  touch = (b0 <= a1) & (b0 < xp.iinfo(xp.int32).max)
  a1 = xp.where(touch, xp.maximum(a1, b1), a1)
  b1 = xp.where(touch | (b0 >= b1), b0, b1)
  nothing = a0 == xp.iinfo(xp.int32).max
  a0, a1 = xp.where(nothing, 0, a0), xp.where(nothing, 0, a1)
  # An empty second span stands at the end of the first: hulls stay tight.
  b0, b1 = xp.where(b0 >= b1, a1, b0), xp.where(b0 >= b1, a1, b1)
  return xp.stack([a0, b0], axis=-2), xp.stack([a1, b1], axis=-2)


def runs(ids: AnyArray) -> tuple[AnyArray, AnyArray]:
  """First position, and one past the last, of the run of equal ids around t."""
  xp = numpy_of(ids)
  ids = xp.asarray(ids)
  num = ids.shape[-1]
  position = xp.broadcast_to(xp.arange(num, dtype=xp.int32), ids.shape)
  changes = ids[..., 1:] != ids[..., :-1]
  edge = xp.ones((*ids.shape[:-1], 1), bool)
  begins = xp.concatenate([edge, changes], axis=-1)
  ends = xp.concatenate([changes, edge], axis=-1)
  # Where a run begins is the last begin so far; where it ends, the next end: a
  # running maximum forwards and a running minimum backwards, in O(T).
  if xp is np:
    starts = np.maximum.accumulate(np.where(begins, position, 0), axis=-1)
    tail = np.where(ends, position + 1, num)[..., ::-1]
    stops = np.minimum.accumulate(tail, axis=-1)[..., ::-1]
  else:
    axis = ids.ndim - 1
    starts = jax.lax.cummax(jnp.where(begins, position, 0), axis=axis)
    stops = jax.lax.cummin(
        jnp.where(ends, position + 1, num), axis=axis, reverse=True
    )
  return starts.astype(xp.int32), stops.astype(xp.int32)
