"""Attention under a mask or a bias that is an array of queries by keys.

Where every query's keys are one or two spans the array becomes a `masks.Mask`,
and `api.attention` attends. Any other array, and a bias, go a piece of queries
at a time through plain products: their memory is that of a piece.

Letters: B batch, T queries, S keys, N query heads, K key and value heads, H
head size, R queries of a piece, P pieces.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
import numpy as np

from kernels_pallas import array_types
from kernels_pallas import logits as logits_lib
from kernels_pallas import masks
from kernels_pallas import output
from kernels_pallas import spans
from kernels_pallas.attention import api
from kernels_pallas.attention import reference

# Queries whose logits are held at once.
_ROWS = 128


class Call(NamedTuple):
  """What is attended, and how.

  Attributes:
    query: [B, T, N, H].
    key: [B, S, K, H].
    value: As key.
    where: Holds besides the array.
    scale: Of the logits.
    implementation: Of `api.attention`.
    return_col_mass: Whether `col_mass` is wanted.
  """

  query: Float[Array, "B T N H"]
  key: Float[Array, "B S K H"]
  value: Float[Array, "B S K H"]
  where: masks.Mask | None
  scale: float
  implementation: Any
  return_col_mass: bool


def attend(
    call: Call,
    allowed: Bool[array_types.AnyArray, "#B #N #T #S"] | None,
    bias: Float[array_types.AnyArray, "#B #N #T #S"] | None,
) -> output.AttentionOutput:
  """Attends where `allowed` and `call.where` both hold; returns lse as well.

  A traced array is looked at while the program runs, which then takes one of
  two ways.

  Args:
    call: The rest.
    allowed: True where a query may read a key; None is everywhere.
    bias: Added to the scaled logits.
  """
  if bias is None and allowed is None:
    return _by_spans(call)
  if bias is not None or allowed.shape[1] > 1 or _has_two(call.where):
    return in_pieces(call, allowed, bias)
  lead = (allowed.shape[0], call.query.shape[1], call.key.shape[1])
  rows = np if isinstance(allowed, np.ndarray) else jnp
  mask, fits = as_mask(rows.broadcast_to(allowed[:, 0], lead))
  mask = mask if call.where is None else mask & call.where
  if isinstance(fits, jax.core.Tracer):
    return jax.lax.cond(
        fits,
        lambda: _by_spans(call._replace(where=mask)),
        lambda: in_pieces(call, allowed, None),
    )
  if fits:
    return _by_spans(call._replace(where=mask))
  return in_pieces(call, allowed, None)


def as_mask(
    allowed: Bool[array_types.AnyArray, "*B T S"],
) -> tuple[masks.Mask, array_types.AnyArray]:
  """Returns the first and last span of each query, and whether they are all."""
  xp = spans.numpy_of(allowed)
  num_keys = allowed.shape[-1]
  edge = xp.zeros((*allowed.shape[:-1], 1), bool)
  before = xp.concatenate([edge, allowed[..., :-1]], axis=-1)
  after = xp.concatenate([allowed[..., 1:], edge], axis=-1)
  begins, ends = allowed & ~before, allowed & ~after
  first = lambda x: xp.argmax(x, axis=-1).astype(xp.int32)
  last = lambda x: num_keys - 1 - first(x[..., ::-1])
  count = begins.sum(axis=-1)
  # Of no span both are empty, of one the second is.
  stops = xp.stack([first(ends) + 1, last(ends) + 1], axis=-2)
  starts = xp.stack([first(begins), last(begins)], axis=-2)
  enough = xp.stack([count > 0, count > 1], axis=-2)
  end = xp.where(count > 0, stops[..., 0, :], 0)[..., None, :]
  mask = masks.Mask(
      xp.where(enough, starts, end).astype(xp.int32),
      xp.where(enough, stops, end).astype(xp.int32),
  )
  return mask, xp.asarray((count <= 2).all())


def in_pieces(
    call: Call,
    allowed: Bool[array_types.AnyArray, "#B #N #T #S"] | None,
    bias: Float[array_types.AnyArray, "#B #N #T #S"] | None,
) -> output.AttentionOutput:
  """By plain products, some queries at a time, forwards and backwards."""
  query = call.query
  batch, num_queries, num_heads, _ = query.shape
  if call.where is not None:
    pairs = reference.allowed_pairs(call.where, num_queries, call.key.shape[1])
    allowed = pairs if allowed is None else pairs & allowed
  size = max(min(_ROWS, num_queries), 1)
  extra = -num_queries % size
  query = jnp.pad(query, ((0, 0), (0, extra), (0, 0), (0, 0)))
  pieces = jnp.moveaxis(query.reshape(batch, -1, size, *query.shape[2:]), 1, 0)
  cut = lambda x: None if x is None else _rows(x, num_queries, extra, size)

  @jax.checkpoint
  def piece(mass: Array, rows: tuple) -> tuple[Array, tuple[Array, Array]]:
    part = _plain(call._replace(query=rows[0]), *rows[1:])
    assert part.lse is not None and part.col_mass is not None
    return mass + part.col_mass, (part.out, part.lse)

  dtype = jnp.promote_types(query.dtype, jnp.float32)
  mass = jnp.zeros((batch, num_heads, call.key.shape[1]), dtype)
  is_row = jnp.arange(num_queries + extra).reshape(-1, size) < num_queries
  mass, (out, lse) = jax.lax.scan(
      piece, mass, (pieces, is_row, cut(allowed), cut(bias))
  )
  out = jnp.moveaxis(out, 0, 1).reshape(batch, -1, *out.shape[3:])
  lse = jnp.moveaxis(lse, 0, 2).reshape(batch, num_heads, -1)
  return output.AttentionOutput(
      out[:, :num_queries],
      lse[..., :num_queries],
      jax.lax.stop_gradient(mass) if call.return_col_mass else None,
  )


def _plain(
    call: Call,
    is_row: Bool[Array, "R"],
    allowed: Bool[Array, "#B #N #R #S"] | None,
    bias: Float[Array, "#B #N #R #S"] | None,
) -> output.AttentionOutput:
  """One piece, with its T x S array; a query without a key gives 0."""
  query, key, value = call.query, call.key, call.value
  dtype = jnp.promote_types(query.dtype, jnp.float32)
  attn_logits = logits_lib.attention_logits(
      query, key, call.scale, None, dtype=dtype, precision="highest"
  )
  if bias is not None:
    attn_logits = attn_logits + bias.astype(dtype)
  is_seen = is_row[None, None, :, None]
  if allowed is not None:
    is_seen = is_seen & allowed
  attn_logits = jnp.where(is_seen, attn_logits, -jnp.inf)
  highest = attn_logits.max(axis=-1, keepdims=True, initial=-jnp.inf)
  highest = jax.lax.stop_gradient(
      jnp.where(jnp.isneginf(highest), 0.0, highest)
  )
  unnormalized = jnp.exp(attn_logits - highest)
  total = unnormalized.sum(axis=-1, keepdims=True)
  safe = jnp.where(total > 0, total, 1.0)
  weights = unnormalized / safe
  groups = (key.shape[0], key.shape[2], -1, *weights.shape[2:])
  out = jnp.einsum(
      "BKGRS,BSKH->BRKGH",
      weights.reshape(groups),
      value.astype(dtype),
      precision="highest",
  ).reshape(*query.shape[:3], value.shape[-1])
  lse = jnp.where(total > 0, jnp.log(safe) + highest, -jnp.inf)[..., 0]
  return output.AttentionOutput(
      out.astype(query.dtype), lse, weights.sum(axis=2)
  )


def _by_spans(call: Call) -> output.AttentionOutput:
  return api.attention(
      call.query,
      call.key,
      call.value,
      where=call.where,
      scale=call.scale,
      implementation=call.implementation,
      return_lse=True,
      return_col_mass=call.return_col_mass,
  )


def _has_two(where: masks.Mask | None) -> bool:
  """Whether it takes two spans, or ids, and cannot meet another such."""
  return where is not None and (
      where.starts.shape[-2] > 1 or where.query_ids is not None
  )


def _rows(
    x: array_types.AnyArray, num_queries: int, extra: int, size: int
) -> Array:
  """Cuts [#B, #N, #T, #S] into [P, #B, #N, R, #S]."""
  x = jnp.broadcast_to(x, (*x.shape[:2], num_queries, x.shape[3]))
  x = jnp.pad(x, ((0, 0), (0, 0), (0, extra), (0, 0)))
  x = x.reshape(*x.shape[:2], -1, size, x.shape[3])
  return jnp.moveaxis(x, 2, 0)
