"""Arithmetic of a tile, as functions of arrays: logits, softmax, gradients.

Used inside the kernels, and by tests as it stands. Everything is float32 and
two-dimensional: queries and keys lie along either axis. Logits are kept in
units in which softmax is 2^x: `log2_scale` = scale log2(e).
"""

from collections.abc import Sequence
import functools
import math
import operator
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

LOG2_E = math.log2(math.e)


def is_allowed(
    keys: jax.Array,
    spans: Sequence[tuple[Any, Any]],
    query_ids: jax.Array | None = None,
    key_ids: jax.Array | None = None,
) -> jax.Array:
  """The mask of a tile, from arrays of its shape.

  Args:
    keys: Positions of the keys.
    spans: First key, and one past the last, of each span of the queries.
    query_ids: None where ids do not matter.
    key_ids: None exactly where `query_ids` is.
  """
  inside = functools.reduce(
      operator.or_, ((keys >= start) & (keys < stop) for start, stop in spans)
  )
  return inside if query_ids is None else inside & (query_ids == key_ids)


def log2_logits(
    products: jax.Array, scale: float, soft_cap: float | None
) -> jax.Array:
  """Logits in units of log 2."""
  if soft_cap is None:
    return products * (scale * LOG2_E)
  # tanh by 2^x: the hardware's own tanh has 11 bits.
  factor = 2 * scale / soft_cap * LOG2_E
  tanh = 1 - 2 / (1 + jnp.exp2(products * factor))
  return tanh * (soft_cap * LOG2_E)


def with_cap_slope(
    weights: jax.Array, logits: jax.Array, soft_cap: float | None
) -> jax.Array:
  """The weights times the derivative of the logits by scale q k / ln 2.

  Made from the logits, masked or not, so that nothing has to be kept in
  registers beside them while the mask is made.
  """
  if soft_cap is None:
    return weights
  tanh = jnp.maximum(logits * (1 / (soft_cap * LOG2_E)), -1.0)
  return weights * (1 - tanh * tanh)


def online_softmax(
    logits: jax.Array, highest: jax.Array, total: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Takes the logits of further keys, along axis 1, into the softmax of rows.

  Args:
    logits: In units of log 2; -inf where masked.
    highest: Largest logit of each row so far, finite.
    total: Sum of 2^(logit - highest) so far.

  Returns:
    2^(logits - highest), the factor of what was summed before, and `highest`
    and `total` with these logits.
  """
  new_highest = jnp.maximum(highest, logits.max(axis=1))
  correction = jnp.exp2(highest - new_highest)
  weights = jnp.exp2(logits - along(new_highest, logits.shape, 0))
  total = total * correction + weights.sum(axis=1)
  return weights, correction, new_highest, total


def weights_of(logits: jax.Array, lse: jax.Array, axis: int) -> jax.Array:
  """2^(logits - lse), with queries along `axis`; lse is inf for no weight."""
  return jnp.exp2(logits - along(lse, logits.shape, axis))


def d_products(
    slopes: jax.Array, d_weights: jax.Array, delta: jax.Array, axis: int
) -> jax.Array:
  """Gradient by scale q k, with queries along `axis`.

  Args:
    slopes: The weights, times the derivative of the soft cap where there is
      one: a single array, because registers are scarce where it is made.
    d_weights: d_out value^T.
    delta: Sum over keys of weights d_weights, less the gradient of lse.
    axis: Of the queries.
  """
  return slopes * (d_weights - along(delta, slopes.shape, axis))


def along(vector: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
  """Repeats a vector that lies along `axis` of a tile."""
  return lax.broadcast_in_dim(vector, shape, [axis])
