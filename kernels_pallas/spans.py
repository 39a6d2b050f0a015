"""Arithmetic of spans of keys, of NumPy arrays and of jax's alike.

Letters as in `masks`: T queries, P spans a query, B batch (may be absent).
"""

from collections.abc import Sequence
import types

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import array_types
from kernels_pallas.array_types import AnyArray

# A position that no key has.
_FAR = 2**30


def to_rank(array: AnyArray, ndim: int) -> AnyArray:
  """Adds leading axes of size 1, so that nothing is promoted silently."""
  return array.reshape((1,) * (ndim - array.ndim) + array.shape)


def numpy_of(
    *arrays: AnyArray | np.integer | Sequence[int] | int,
) -> types.ModuleType:
  """NumPy where all are known while tracing, else jax.numpy."""
  known = (int, np.integer, np.ndarray, Sequence)
  return np if all(isinstance(a, known) for a in arrays) else jnp


def number(name: str, value: object, least: int = -_FAR) -> AnyArray:
  """An integer, or one per sequence, as int32 [*B].

  Args:
    name: For the error.
    value: An int, or an array of integers, which may be traced.
    least: Smaller ones are refused, or replaced by it where they are traced.

  Raises:
    ValueError: If it is no integer, or is known and too small.
  """
  xp = jnp if isinstance(value, jax.Array) else np
  array = xp.asarray(value)
  if not xp.issubdtype(array.dtype, xp.integer):
    raise ValueError(
        f"{name}={value} is {array.dtype}; it must be an integer, or an array"
        " of one integer per sequence"
    )
  if xp is np and array.size and array.min() < least:
    raise ValueError(f"{name}={array.min()} must be at least {least}")
  # Far beyond all keys, and sums of two still are int32.
  bounds = (max(least, xp.iinfo(array.dtype).min), _FAR)
  bounds = bounds[0], min(_FAR, xp.iinfo(array.dtype).max)
  return xp.asarray(xp.clip(array, *bounds), xp.int32)


def positions(num_queries: int, offset: array_types.Number) -> AnyArray:
  """Positions of the queries among the keys, int32 [*B, T]."""
  first = number("offset", offset)[..., None]
  own = numpy_of(first).arange(num_queries, dtype=np.int32)
  return first + to_rank(own, first.ndim)


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


def next_true(flags: AnyArray) -> AnyArray:
  """Position of the first True at t or after it, else T; int32 [*B, T]."""
  xp = numpy_of(flags)
  num = flags.shape[-1]
  here = xp.where(flags, xp.arange(num, dtype=xp.int32), num)
  here = here.astype(xp.int32)
  if xp is np:
    return np.minimum.accumulate(here[..., ::-1], axis=-1)[..., ::-1]
  return jax.lax.cummin(here, axis=here.ndim - 1, reverse=True)
