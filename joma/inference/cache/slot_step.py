"""A decode step of a slot cache: choose a slot, write, attend, score.

Letters: B batch, C slots, N query heads, K key and value heads, G = N / K, H
head size.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from joma.inference.cache import cache_options
from joma.inference.cache import policy as policy_lib
from joma.inference.cache import slot_arrays
from joma.inference.cache import storage
from joma.transformer import attention
from joma.transformer import one_query
from kernels_pallas import implementations
from kernels_pallas.decode import api
from kernels_pallas.decode import rule as kernel_rule
from kernels_pallas.decode import slots as kernel_slots


def view(cache: Any) -> policy_lib.Slots:
  """Returns what the policy sees."""
  return policy_lib.Slots(
      storage.read(cache.key),
      storage.read(cache.value),
      cache.score,
      cache.pos,
      cache.aux,
      cache.state,
      cache.layer,
      cache.num_groups,
  )


def choose_slot(
    cache: Any, position: Int[Array, "B"]
) -> tuple[Int[Array, "B K"], Bool[Array, "B K C"]]:
  """Returns the slot of the token at `position`, and which ones are freed.

  A full cache of a policy that never evicts has none: the slot is then C.
  """
  pos, capacity = cache.pos, cache.capacity
  ranks = policy_lib.rank(cache.policy, view(cache), position)
  page = cache.options.page_size
  if page > 1:
    slot, freed = _choose_page(ranks, pos, page)
  else:
    slot = kernel_rule.first_least(ranks)  # Empty slots have -inf.
    freed = jnp.arange(capacity)[None, None] == slot[..., None]
  if not cache.policy.evicts:
    is_full = (pos >= 0).all(axis=-1)
    slot = jnp.where(is_full, capacity, slot)
    freed = freed & ~is_full[..., None]
  return slot.astype(jnp.int32), freed


def is_fused(cache: Any, options: attention.AttentionOptions) -> bool:
  """Returns whether one kernel does the whole step, where kernels run."""
  chosen = implementations.choose(options.implementation, {"tpu": "pallas_tpu"})
  is_plain = cache.options == cache_options.DEFAULT
  has_kernel = cache.policy.kernel_options() is not None
  # The kernel writes whole tiles of memory: 32 bytes of rows.
  has_tiles = cache.capacity * cache.key.data.dtype.itemsize % 32 == 0
  is_softmax = options.weights is None  # The kernel knows no sinks.
  return all(
      (chosen == "pallas_tpu", is_plain, has_kernel, has_tiles, is_softmax)
  )


def decode_fused(cache, query, key, value, positions, rotate, options):
  """As `decode`, by `kernels_pallas.decode` in one pass."""
  kernel_options = cache.policy.kernel_options()
  # A rule with votes has them in `aux`; other policies with a kernel have none.
  bits = lambda x, dtype: (
      None if x is None else jax.lax.bitcast_convert_type(x, dtype)
  )
  kept = kernel_slots.Slots(
      key=cache.key.data,
      value=cache.value.data,
      score=cache.score,
      pos=cache.pos,
      key_scale=cache.key.scale,
      value_scale=cache.value.scale,
      votes=bits(cache.aux, jnp.int32),
  )
  out, kept, _ = api.decode_step(
      rotate(query, positions)[:, 0],
      rotate(key, positions)[:, 0],
      value[:, 0],
      kept,
      positions[:, 0],
      scale=options.scale,
      logits_soft_cap=options.logits_soft_cap,
      window=options.window,
      implementation="pallas_tpu",
      **kernel_options,
  )
  cache = dataclasses.replace(
      cache,
      key=storage.Stored(kept.key, kept.key_scale),
      value=storage.Stored(kept.value, kept.value_scale),
      score=kept.score,
      pos=kept.pos,
      aux=bits(kept.votes, jnp.uint32),
  )
  return out[:, None], cache


def decode(cache, query, key, value, positions, rotate, options):
  """Takes one token of each sequence; returns out, and the cache.

  Arguments and results are those of `kv_cache.SlotCache.attend` with T = 1.
  """
  position = positions[:, 0]
  is_active = position >= 0
  is_raw = cache.options.keys == "raw"
  raw_query, num_kv_heads = query, key.shape[2]
  kept_key = key if is_raw else rotate(key, positions)
  kept_key, value = kept_key[:, 0], value[:, 0]
  token = policy_lib.Token(
      key=kept_key,
      value=value,
      raw_query=_grouped(raw_query[:, 0], num_kv_heads),
      position=position,
      rotate=rotate,
      scale=options.scale,
      layer=cache.layer,
  )
  old, (slot, freed) = cache, choose_slot(cache, position)
  cache = _write(cache, token, slot, freed & is_active[:, None, None])
  keys, query = _rotated(cache, raw_query, positions, rotate, is_raw)
  is_seen = cache.pos >= 0
  if options.window is not None:
    is_seen = is_seen & (cache.pos > (position - options.window)[:, None, None])
  out, attn_logits = one_query.attend(
      query, keys, storage.read(cache.value), is_seen, options
  )
  if not cache.policy.evicts:
    overflows = (slot >= cache.capacity).any(axis=-1) & is_active
    out = jnp.where(overflows[:, None, None, None], jnp.nan, out)
  step = policy_lib.Step(
      attn_logits, one_query.weights(attn_logits, options), position
  )
  score, aux, state = cache.policy.observe(view(cache), step)
  cache = dataclasses.replace(cache, score=score, aux=aux, state=state)
  return out, where_active(is_active, cache, old)


def _write(cache, token, slot, freed) -> Any:
  """Puts a token into its slot; what is freed besides is empty then."""
  capacity = cache.capacity
  is_new = jnp.arange(capacity)[None, None] == slot[..., None]
  is_new = is_new & (token.position >= 0)[:, None, None]
  score, aux, state = cache.policy.enter(token, cache.state)
  fill = lambda x, new, empty: jnp.where(
      slot_arrays.like(is_new, x),
      new[:, :, None],
      jnp.where(slot_arrays.like(freed, x), empty, x),
  )
  pos = fill(cache.pos, _per_head(token.position, slot), -1)
  slot = jnp.where((token.position >= 0)[:, None], slot, capacity)
  return dataclasses.replace(
      cache,
      key=storage.write_slot(cache.key, token.key, slot),
      value=storage.write_slot(cache.value, token.value, slot),
      score=fill(cache.score, score, 0.0),
      pos=pos,
      rank=_next_ranks(cache, freed, is_new),
      aux=jax.tree.map(
          lambda x, new: fill(x, new, jnp.zeros((), x.dtype)), cache.aux, aux
      ),
      state=state,
  )


def _next_ranks(cache, freed, is_new) -> Any:
  """Ranks above those that leave fall; the new token has the greatest."""
  if cache.rank is None:
    return None
  leaves = freed & (cache.pos >= 0)
  if cache.options.page_size == 1:
    # One at most: no count over pairs.
    gone = jnp.where(leaves, cache.rank, cache.capacity).min(-1, keepdims=True)
    below = (cache.rank > gone).astype(jnp.int32)
  else:
    below = jnp.sum(
        leaves[..., None, :]
        & (cache.rank[..., None, :] < cache.rank[..., None]),
        axis=-1,
    )
  rank = jnp.where(freed, -1, cache.rank - below)
  count = ((cache.pos >= 0) & ~leaves).sum(axis=-1, keepdims=True)
  return jnp.where(is_new, count, rank).astype(jnp.int32)


def _rotated(cache, raw_query, positions, rotate, is_raw) -> tuple[Any, Any]:
  """Returns keys and query as they meet."""
  keys = storage.read(cache.key)
  if not is_raw:
    return keys, rotate(raw_query, positions)
  batch, num_kv_heads, capacity, head_dim = keys.shape
  if cache.rank is not None:
    # All heads of a sequence keep the same number of tokens.
    newest = cache.rank.max(axis=(1, 2))[:, None]
    positions = jnp.where(positions < 0, -1, newest)
  where = cache.pos if cache.rank is None else cache.rank
  keys = rotate(
      keys.reshape(batch * num_kv_heads, capacity, 1, head_dim),
      where.reshape(batch * num_kv_heads, capacity),
  ).reshape(keys.shape)
  return keys, rotate(raw_query, positions)


def _choose_page(ranks, pos, page) -> tuple[Any, Any]:
  """First empty slot, else the page of the least sum that may leave."""
  batch, num_kv_heads, capacity = pos.shape
  is_empty = pos < 0
  pages = ranks.reshape(batch, num_kv_heads, -1, page)
  victim = jnp.argmin(pages.sum(axis=-1), axis=-1)
  is_full = ~is_empty.any(axis=-1)
  slot = jnp.where(is_full, victim * page, jnp.argmax(is_empty, axis=-1))
  of_page = jnp.arange(capacity)[None, None] // page == victim[..., None]
  is_slot = jnp.arange(capacity)[None, None] == slot[..., None]
  return slot, jnp.where(is_full[..., None], of_page, is_slot)


def where_active(is_active: Bool[Array, "B"], new: Any, old: Any) -> Any:
  """Sequences without a token keep what they had; keys were not written."""
  choose = lambda a, b: jnp.where(slot_arrays.like(is_active, a), a, b)
  names = ("score", "pos", "rank", "aux", "state")
  return dataclasses.replace(
      new,
      **{
          name: jax.tree.map(choose, getattr(new, name), getattr(old, name))
          for name in names
      },
  )


def _grouped(query, num_kv_heads) -> Any:
  return query.reshape(len(query), num_kv_heads, -1, query.shape[-1])


def _per_head(position, slot) -> Any:
  return jnp.broadcast_to(position[:, None], slot.shape)
