"""Attention of a strip: some queries of one key head, and all of their keys.

A strip of logits is small enough for the cache of a CPU, and holds whole rows
of the softmax, so that its weights are final: their sums over queries come
without a second product.

Letters: G heads that share the key head, T queries, S keys, H head size.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels_pallas import logits as logits_lib
from kernels_pallas.attention import differentiable

_einsum = lambda form, *args: jnp.einsum(form, *args, precision="highest")


def forward(
    query: Float[Array, "G T H"],
    key: Float[Array, "S H"],
    value: Float[Array, "S H"],
    allowed: Bool[Array, "T S"] | None,
    sink_logits: Float[Array, "G"] | None,
    row_weights: Float[Array, "G T"] | None,
    spec: differentiable.AttentionSpec,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """Computes out [G, T, H], lse [G, T] and col_mass [G, S].

  Args:
    query: Already scaled; all arrays are of the type to compute in.
    key: Keys of the strip.
    value: Their values.
    allowed: None allows all.
    sink_logits: A key without a value.
    row_weights: Weights of the queries in `col_mass`; None returns no col_mass.
    spec: Of the attention.
  """
  attn_logits = _masked(_capped_logits(query, key, spec), allowed)
  highest = attn_logits.max(axis=-1)
  if sink_logits is not None:
    highest = jnp.maximum(highest, sink_logits[:, None])
  highest = jnp.where(jnp.isneginf(highest), 0.0, highest)
  unnormalized = jnp.exp(attn_logits - highest[..., None])
  total = unnormalized.sum(axis=-1)
  if sink_logits is not None:
    total += jnp.exp(sink_logits[:, None] - highest)
  is_empty = total == 0  # False for NaN, which is handed on.
  inverse = jnp.where(is_empty, 0.0, 1 / jnp.where(is_empty, 1.0, total))
  lse = jnp.where(is_empty, -jnp.inf, highest + jnp.log(total))
  # Divided after the product, H numbers a row instead of S.
  out = _einsum("GTS,SH->GTH", unnormalized, value) * inverse[..., None]
  if row_weights is None:
    return out, lse, None
  return out, lse, _einsum("GTS,GT->GS", unnormalized, row_weights * inverse)


def backward(
    query: Float[Array, "G T H"],
    key: Float[Array, "S H"],
    value: Float[Array, "S H"],
    allowed: Bool[Array, "T S"] | None,
    lse: Float[Array, "G T"],
    delta: Float[Array, "G T"],
    d_out: Float[Array, "G T H"],
    spec: differentiable.AttentionSpec,
) -> tuple[Any, Any, Any]:
  """Computes the cotangents of the scaled query, of key and of value.

  Those of key and value are [H, S]: XLA would copy an array of T S numbers to
  transpose it for products that are [S, H].

  Args:
    query: Already scaled; all arrays are of the type to compute in.
    key: Keys of the strip.
    value: Their values.
    allowed: None allows all.
    lse: From `forward`.
    delta: See `differentiable`.
    d_out: Cotangent of out.
    spec: Of the attention.
  """
  capped = _capped_logits(query, key, spec)
  attn_weights = _weights(capped, allowed, lse)
  d_value = _einsum("GTH,GTS->HS", d_out, attn_weights)
  d_weights = _einsum("GTH,SH->GTS", d_out, value)
  # The softmax's own derivative; forbidden pairs have weight 0.
  d_logits = attn_weights * (d_weights - delta[..., None])
  if spec.logits_soft_cap is not None:
    d_logits *= 1 - jnp.square(capped / spec.logits_soft_cap)
  d_query = _einsum("GTS,SH->GTH", d_logits, key)
  return d_query, _einsum("GTH,GTS->HS", query, d_logits), d_value


def col_mass(
    query: Float[Array, "G T H"],
    key: Float[Array, "S H"],
    allowed: Bool[Array, "T S"] | None,
    lse: Float[Array, "G T"],
    row_weights: Float[Array, "G T"],
    spec: differentiable.AttentionSpec,
) -> Float[Array, "G S"]:
  """Column sums where lse is known; arguments as in `forward`."""
  weights = _weights(_capped_logits(query, key, spec), allowed, lse)
  return _einsum("GTS,GT->GS", weights, row_weights)


def _weights(
    capped: Float[Array, "G T S"],
    allowed: Bool[Array, "T S"] | None,
    lse: Float[Array, "G T"],
) -> Float[Array, "G T S"]:
  """Attention weights; 0 where a query has no key."""
  safe_lse = jnp.where(jnp.isneginf(lse), 0.0, lse)
  return jnp.exp(_masked(capped, allowed) - safe_lse[..., None])


def _capped_logits(
    query: Float[Array, "G T H"],
    key: Float[Array, "S H"],
    spec: differentiable.AttentionSpec,
) -> Float[Array, "G T S"]:
  products = _einsum("GTH,SH->GTS", query, key)
  return logits_lib.soft_cap(products, spec.logits_soft_cap)


def _masked(attn_logits: jax.Array, allowed: jax.Array | None) -> jax.Array:
  if allowed is None:
    return attn_logits
  return jnp.where(allowed, attn_logits, -jnp.inf)
