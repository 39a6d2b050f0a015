"""Attention by any rule, some queries at a time: memory O(T), on XLA.

A part of the queries has its weights as one array; the backward pass computes
them anew. What the kernels can do they do faster.

Letters: B batch, T queries, S keys, N query heads, K key and value heads, H
head size, E learned keys.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from joma.transformer import hooks
from joma.transformer.weighing import parts
from joma.transformer.weighing import rule as rules
from kernels_pallas import logits as logits_lib
from kernels_pallas import selection
from kernels_pallas.attention import reference

# Queries of a part, or the next multiple of a selection's block.
_SIZE = 128

Drop = Callable[[Array], Array]


def masked_logits(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    where: hooks.Where,
    options: hooks.AttentionOptions,
    places: tuple[Int[Array, "#B T"], Int[Array, "#B S"]],
) -> Float[Array, "B N T S"]:
  """Attention logits as one array, float32: to look at, or to drop from.

  Args:
    query: Rotated.
    key: Rotated.
    where: What is seen; the rest is -inf.
    options: Scale, soft cap, and the rule's bias.
    places: Positions of queries and keys.
  """
  attn_logits = logits_lib.attention_logits(
      query, key, options.scale, options.logits_soft_cap
  )
  rule = options.weights
  if rule is not None and rule.bias is not None:
    attn_logits = attn_logits + rule.bias(query, *places)
  if isinstance(where, selection.Selection):
    where = selection.by_query_head(where, query.shape[2])
  allowed = reference.allowed_pairs(where, query.shape[1], key.shape[1])
  return jnp.where(allowed, attn_logits, -jnp.inf)


def of_logits(
    attn_logits: Float[Array, "B N T S"],
    query: Float[Array, "B T N H"],
    options: hooks.AttentionOptions,
) -> tuple[Float[Array, "B N T S"], Float[Array, "B N T E"] | None]:
  """Weights of logits by the options' rule, and those of its learned keys."""
  rest = rules.rest_logits(
      options.weights, query, options.scale, options.logits_soft_cap
  )
  return rules.weights(attn_logits, options.weights, rest)


def attend_at_once(
    query: Float[Array, "#B T N H"],
    key: Float[Array, "#B S K H"],
    value: Float[Array, "B S K H"],
    where: hooks.Where,
    options: hooks.AttentionOptions,
    places: tuple[Int[Array, "#B T"], Int[Array, "#B S"]],
    drop: Drop = lambda weights: weights,
) -> Float[Array, "B T N H"]:
  """Attends with all weights as one array, one for all texts if queries are.

  Args:
    query: Rotated.
    key: Rotated.
    value: Of the keys.
    where: What is seen.
    options: With the rule.
    places: As in `masked_logits`.
    drop: Of the weights, those of learned keys too.
  """
  attn_logits = masked_logits(query, key, where, options, places)
  # Rows of nothing give 0, and no gradient that is no number.
  is_empty = jnp.isneginf(attn_logits.max(axis=-1, keepdims=True))
  attn_logits = jnp.where(is_empty, 0.0, attn_logits)
  weights, rest = of_logits(attn_logits, query, options)
  weights = jnp.where(is_empty, 0.0, weights)
  extra = rules.extra_values(options.weights, value)
  if rest is not None and extra is not None:
    weights = jnp.concatenate([weights, rest], axis=-1)
    value = jnp.concatenate([value, extra], axis=1)
  return weighted(drop(weights), value)


def attend(
    query: Float[Array, "#B T N H"],
    key: Float[Array, "#B S K H"],
    value: Float[Array, "B S K H"],
    where: hooks.Where,
    options: hooks.AttentionOptions,
    places: tuple[Int[Array, "#B T"], Int[Array, "#B S"]],
) -> Float[Array, "B T N H"]:
  """As `attend_at_once`, a part of the queries after the other."""
  length, size = query.shape[1], _SIZE
  if isinstance(where, selection.Selection):
    size = -(-_SIZE // where.block_q) * where.block_q
  if length <= size:
    return attend_at_once(query, key, value, where, options, places)
  num_parts = -(-length // size)
  fill = num_parts * size - length
  query = jnp.pad(query, ((0, 0), (0, fill), (0, 0), (0, 0)))
  query_places = jnp.pad(places[0], ((0, 0), (0, fill)))
  where = parts.filled(where, num_parts * size)

  @jax.checkpoint
  def part(start: Int[Array, ""]) -> Float[Array, "B t N H"]:
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, 1)
    seen = parts.rows_of(where, start, size)
    own = (cut(query_places), places[1])
    return attend_at_once(cut(query), key, value, seen, options, own)

  found = jax.lax.map(part, size * jnp.arange(num_parts))
  out = found.swapaxes(0, 1).reshape(len(value), *query.shape[1:])
  return out[:, :length]


def weighted(
    weights: Float[Array, "#B N T S"], value: Float[Array, "B S K H"]
) -> Float[Array, "B T N H"]:
  """Sums of values by weights; heads of a group share theirs, texts may."""
  _, num_heads, num_queries, num_keys = weights.shape
  batch, _, num_kv_heads, head_dim = value.shape
  grouped = weights.astype(value.dtype).reshape(
      len(weights), num_kv_heads, -1, num_queries, num_keys
  )
  if len(weights) == 1:
    out = jnp.einsum("KGTS,BSKH->BTKGH", grouped[0], value)
  else:
    out = jnp.einsum("BKGTS,BSKH->BTKGH", grouped, value)
  return out.reshape(batch, num_queries, num_heads, head_dim)
