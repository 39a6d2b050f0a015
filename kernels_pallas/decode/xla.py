"""A decode step by XLA, in place: what CPUs run.

The new row is scattered into the donated cache, and two products go along the
cache as it lies. Nothing of the cache is concatenated, transposed or copied:
temporary arrays are the logits, and of int8 one head of the cache. Of bfloat16
XLA's CPU compiler makes a float32 copy, as it has no products of it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.decode import rule as rule_lib
from kernels_pallas.decode import slots as slots_lib


def step(
    token: slots_lib.Token, cache: slots_lib.Slots, rule: rule_lib.Rule
) -> slots_lib.Stepped:
  """Computes the op, see `reference`."""
  query, key, value, positions = token
  slot = rule_lib.choose(cache.score, cache.pos, positions, rule)
  cache = write(cache, token, slot, rule)
  batch, num_heads, head_dim = query.shape
  dtype = jnp.promote_types(query.dtype, jnp.float32)
  grouped = query.reshape(batch, key.shape[1], -1, head_dim).astype(dtype)
  is_seen = rule_lib.sees(cache.pos, positions[:, None, None], rule)
  out, weights = attend(grouped, cache, is_seen, rule)
  is_active = (positions >= 0)[:, None, None]
  out = jnp.where(is_active, out.reshape(batch, num_heads, -1), 0)
  cache = rule_lib.updated(cache, weights, is_seen, positions, rule)
  return out.astype(query.dtype), cache, slot


def write(
    cache: slots_lib.Slots,
    token: slots_lib.Token,
    slot: Int[Array, "B K"],
    rule: rule_lib.Rule,
) -> slots_lib.Slots:
  """Puts new rows into their slots; -1 is none."""
  batch, num_kv_heads = slot.shape
  # -1 would count from the end; what is past the end is dropped.
  where = jnp.where(slot < 0, cache.capacity, slot)
  at = (jnp.arange(batch)[:, None], jnp.arange(num_kv_heads)[None], where)
  by_head = jnp.broadcast_to(token.positions[:, None], slot.shape)
  return write_at(cache, token.key, token.value, by_head, at, rule)


def write_at(
    cache: slots_lib.Slots,
    key: Float[Array, "*rows H"],
    value: Float[Array, "*rows J"],
    positions: Int[Array, "*rows"],
    at: tuple[Array, ...],
    rule: rule_lib.Rule,
) -> slots_lib.Slots:
  """Puts new rows where `at` says; what is past an end is dropped."""
  put = lambda kept, new: kept.at[at].set(new.astype(kept.dtype), mode="drop")
  # Before the key is rounded to int8, as in the reference.
  score = put(cache.score, rule_lib.entering(key, rule))
  others: dict[str, Any] = {}
  if cache.is_quantized:
    key, key_scale = slots_lib.quantize(key)
    value, value_scale = slots_lib.quantize(value)
    others["key_scale"] = put(cache.key_scale, key_scale)
    others["value_scale"] = put(cache.value_scale, value_scale)
  if cache.votes is not None:
    others["votes"] = put(cache.votes, jnp.zeros_like(positions))
  return slots_lib.Slots(
      key=put(cache.key, key),
      value=put(cache.value, value),
      score=score,
      pos=put(cache.pos, positions),
      **others,
  )


def attend(
    query: Float[Array, "B K G H"],
    cache: slots_lib.Slots,
    is_seen: Bool[Array, "B K C"],
    rule: rule_lib.Rule,
) -> tuple[Float[Array, "B K G J"], Float[Array, "B K G C"]]:
  """Out and weights; weights are 0 where nothing is seen."""
  if cache.key.dtype == query.dtype and not cache.is_quantized:
    products = jnp.einsum(
        "BKGH,BKCH->BKCG", query, cache.key, precision="highest"
    )
    # XLA's CPU reads keys once, as rows, if slots stand before heads of a
    # group, and the barrier keeps it from exchanging them.
    products = jax.lax.optimization_barrier(products).swapaxes(2, 3)
    weights = _softmax(products, is_seen, rule)
    out = jnp.einsum(
        "BKGC,BKCH->BKGH", weights, cache.value, precision="highest"
    )
    return out, weights
  return _attend_by_head(query, cache, is_seen, rule)


def _attend_by_head(
    query: jax.Array,
    cache: slots_lib.Slots,
    is_seen: jax.Array,
    rule: rule_lib.Rule,
) -> tuple[jax.Array, jax.Array]:
  """One key head at a time is brought into the type of the query."""
  batch, num_kv_heads = query.shape[:2]
  rows = lambda x: None if x is None else x.reshape(-1, *x.shape[2:])
  wide = lambda x: x.astype(query.dtype)

  def visit(
      arrays: tuple[Any, ...],
  ) -> tuple[jax.Array, jax.Array]:
    query, key, value, key_scale, value_scale, is_seen = arrays
    products = jnp.dot(query, wide(key).T, precision="highest")
    products = products if key_scale is None else products * key_scale[None]
    weights = _softmax(products, is_seen, rule)
    shares = weights if value_scale is None else weights * value_scale[None]
    return jnp.dot(shares, wide(value), precision="highest"), weights

  arrays = (query, cache.key, cache.value, cache.key_scale, cache.value_scale)
  out, weights = jax.lax.map(visit, tuple(map(rows, (*arrays, is_seen))))
  apart = lambda x: x.reshape(batch, num_kv_heads, *x.shape[1:])
  return apart(out), apart(weights)


def _softmax(
    products: Float[Array, "*rows G C"],
    is_seen: Bool[Array, "*rows C"],
    rule: rule_lib.Rule,
) -> Array:
  logits = rule_lib.capped(rule.scale * products, rule)
  is_seen = is_seen[..., None, :]
  logits = jnp.where(is_seen, logits, jnp.finfo(logits.dtype).min)
  weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
  weights = jnp.where(is_seen, weights, 0)
  total = weights.sum(axis=-1, keepdims=True)
  return weights / jnp.where(total > 0, total, 1)
