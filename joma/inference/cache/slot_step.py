"""A decode step of a slot cache: choose a slot, write, attend, score.

Letters: B batch, C slots, N query heads, K key and value heads, G = N / K, H
head size.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from joma.inference.cache import cache_options
from joma.inference.cache import calls
from joma.inference.cache import policy as policy_lib
from joma.inference.cache import slot_arrays
from joma.inference.cache import storage
from joma.inference.cache import tokens
from joma.transformer import hooks
from joma.transformer import sharding
from joma.transformer.weighing import one_query
from kernels_pallas import implementations
from kernels_pallas.decode import api
from kernels_pallas.decode import rule as kernel_rule
from kernels_pallas.decode import slots as kernel_slots

Cache = TypeVar("Cache", bound=slot_arrays.SlotArrays)


def view(cache: slot_arrays.SlotArrays) -> policy_lib.Slots:
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
    cache: slot_arrays.SlotArrays, position: Int[Array, "B"]
) -> tuple[Int[Array, "B K"], Bool[Array, "B K C"]]:
  """Returns the slot of the token at `position`, and which ones are freed.

  A full cache of a policy that never evicts has none: the slot is then C.
  """
  pos, capacity = cache.pos, cache.capacity
  ranks = calls.rank(cache.policy, view(cache), position)
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


def is_fused(
    cache: slot_arrays.SlotArrays, options: hooks.AttentionOptions
) -> bool:
  """Returns whether one kernel does the whole step, where kernels run."""
  chosen = implementations.choose(options.implementation, {"tpu": "pallas_tpu"})
  is_plain = cache.options == cache_options.DEFAULT
  has_kernel = calls.kernel_options(cache.policy) is not None
  # The kernel writes whole tiles of memory: 32 bytes of rows.
  has_tiles = cache.capacity * cache.key.data.dtype.itemsize % 32 == 0
  is_softmax = options.weights is None  # The kernel knows no sinks.
  return all(
      (chosen == "pallas_tpu", is_plain, has_kernel, has_tiles, is_softmax)
  )


def decode_fused(
    cache: Cache, new: tokens.Tokens
) -> tuple[Float[Array, "B 1 N H"], Cache]:
  """As `decode`, by `kernels_pallas.decode` in one pass."""
  kernel_options = calls.kernel_options(cache.policy)
  assert kernel_options is not None  # Else `is_fused` would be False.
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
  step = functools.partial(
      api.decode_step,
      scale=new.options.scale,
      logits_soft_cap=new.options.logits_soft_cap,
      window=new.options.window,
      implementation="pallas_tpu",
      **kernel_options,
  )
  vectors = new.rotated_query, new.rotated_key, new.value
  out, kept, slot = _by_heads(
      step, kept, [x[:, 0] for x in vectors], new.positions[:, 0]
  )
  cache = dataclasses.replace(
      cache,
      key=storage.Stored(kept.key, kept.key_scale),
      value=storage.Stored(kept.value, kept.value_scale),
      score=_entered(cache, new, kept.score, slot),
      pos=kept.pos,
      aux=bits(kept.votes, jnp.uint32),
  )
  return out[:, None], cache


def _by_heads(
    step: Callable[..., PyTree],
    kept: kernel_slots.Slots,
    vectors: Sequence[Array],
    position: Int[Array, "B"],
) -> PyTree:
  """Calls `step(*vectors, kept, position)`; on a mesh each device its heads."""
  leaves, treedef = jax.tree.flatten(kept)
  num = len(vectors)
  # Sequences and heads come first in all of them.
  label = lambda x: "bn" + "." * (x.ndim - 2)

  def of_part(*arrays: Array) -> PyTree:
    *slots, position = arrays
    slots, vectors = slots[:-num], slots[-num:]
    return step(*vectors, jax.tree.unflatten(treedef, slots), position)

  arrays = (*leaves, *vectors)
  return sharding.per_head(
      of_part,
      (*arrays, position),
      [*map(label, arrays), "b"],
      ("bn.", jax.tree.map(label, kept), "bn"),
  )


def _entered(
    cache: slot_arrays.SlotArrays,
    new: tokens.Tokens,
    score: Float[Array, "B K C"],
    slot: Int[Array, "B K"],
) -> Float[Array, "B K C"]:
  """Gives new tokens the policy's score where the kernel makes its own.

  The kernel sees a key after rotation, which has rounded its norm.
  """
  options = calls.kernel_options(cache.policy)
  if options is None or options["score"] != "key_norm":
    return score
  token = new.one(cache.layer)
  entering, _, _ = calls.enter(cache.policy, token, cache.state)
  is_new = jnp.arange(cache.capacity)[None, None] == slot[..., None]
  return jnp.where(is_new, entering[..., None], score)


def decode(
    cache: Cache, new: tokens.Tokens
) -> tuple[Float[Array, "B 1 N H"], Cache]:
  """Takes one token of each sequence.

  Args:
    cache: Of one layer.
    new: The tokens, T = 1.

  Returns:
    The outputs of attention, and the cache.
  """
  options, position = new.options, new.positions[:, 0]
  is_active = position >= 0
  token = new.one(cache.layer, is_raw=cache.options.keys == "raw")
  old, cache = cache, without_freed(cache, position)
  slot, freed = choose_slot(cache, position)
  if calls.merges(cache.policy):
    leaving = jax.lax.top_k(freed, cache.options.page_size)[1]
    cache = handed_on(cache, leaving, (cache.pos >= 0) & ~freed, position)
  cache = _write(cache, token, slot, freed & is_active[:, None, None])
  keys, query = _rotated(cache, new)
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
      attn_logits, one_query.weights(attn_logits, query, options), position
  )
  score, aux, state = calls.observe(cache.policy, view(cache), step)
  cache = dataclasses.replace(cache, score=score, aux=aux, state=state)
  return out, where_active(is_active, cache, old)


def handed_on(
    cache: Cache,
    leaving: Int[Array, "B K L"],
    stays: Bool[Array, "B K C"],
    position: Int[Array, "B"],
) -> Cache:
  """Lets what leaves change the values of what stays, as the policy has it.

  Args:
    cache: Before anything has left.
    leaving: Slots among which are all those that leave.
    stays: Whether a slot holds a token that stays.
    position: Of each sequence's new token; -1 is none, and nothing changes.
  """
  if not calls.merges(cache.policy):
    return cache
  slots = view(cache)
  value = calls.merged(cache.policy, slots, leaving, stays, position)
  changed = (value != slots.value).any(axis=-1) & stays
  changed = changed & (position >= 0)[:, None, None]
  value = jax.tree.map(
      lambda new, old: jnp.where(slot_arrays.like(changed, old), new, old),
      storage.write(cache.value, value),
      cache.value,
  )
  return dataclasses.replace(cache, value=value)


def without_freed(cache: Cache, position: Int[Array, "B"]) -> Cache:
  """Empties what the policy has no use for from `position` on."""
  pos = calls.still_kept(cache.policy, view(cache), position)
  if pos is cache.pos:
    return cache
  rank = None if cache.rank is None else slot_arrays.ranks_of(pos)
  return dataclasses.replace(cache, pos=pos, rank=rank)


def _write(
    cache: Cache,
    token: policy_lib.Token,
    slot: Int[Array, "B K"],
    freed: Bool[Array, "B K C"],
) -> Cache:
  """Puts a token into its slot; what is freed besides is empty then."""
  capacity = cache.capacity
  is_new = jnp.arange(capacity)[None, None] == slot[..., None]
  is_new = is_new & (token.position >= 0)[:, None, None]
  score, aux, state = calls.enter(cache.policy, token, cache.state)
  fill = lambda x, new, empty: jnp.where(
      slot_arrays.like(is_new, x),
      new[:, :, None],
      jnp.where(slot_arrays.like(freed, x), empty, x),
  )
  pos = fill(
      cache.pos, jnp.broadcast_to(token.position[:, None], slot.shape), -1
  )
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


def _next_ranks(
    cache: slot_arrays.SlotArrays,
    freed: Bool[Array, "B K C"],
    is_new: Bool[Array, "B K C"],
) -> Int[Array, "B K C"] | None:
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


def _rotated(
    cache: slot_arrays.SlotArrays, new: tokens.Tokens
) -> tuple[Float[Array, "B K C H"], Float[Array, "B 1 N H"]]:
  """Returns keys and query as they meet."""
  keys, positions = storage.read(cache.key), new.positions
  if cache.options.keys != "raw":
    return keys, new.rotated_query
  batch, num_kv_heads, capacity, head_dim = keys.shape
  if cache.rank is not None:
    # All heads of a sequence keep the same number of tokens.
    newest = cache.rank.max(axis=(1, 2))[:, None]
    positions = jnp.where(positions < 0, -1, newest)
  where = cache.pos if cache.rank is None else cache.rank
  keys = new.rotate(
      keys.reshape(batch * num_kv_heads, capacity, 1, head_dim),
      where.reshape(batch * num_kv_heads, capacity),
  ).reshape(keys.shape)
  return keys, new.rotate(new.query, positions)


def _choose_page(
    ranks: Float[Array, "B K C"], pos: Int[Array, "B K C"], page: int
) -> tuple[Int[Array, "B K"], Bool[Array, "B K C"]]:
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


def where_active(
    is_active: Bool[Array, "B"],
    new: Cache,
    old: slot_arrays.SlotArrays,
) -> Cache:
  """Sequences without a token keep what they had; keys were not written."""
  choose = lambda a, b: jnp.where(slot_arrays.like(is_active, a), a, b)
  arrays = lambda cache: (
      cache.score,
      cache.pos,
      cache.rank,
      cache.aux,
      cache.state,
  )
  score, pos, rank, aux, state = jax.tree.map(choose, arrays(new), arrays(old))
  return dataclasses.replace(
      new, score=score, pos=pos, rank=rank, aux=aux, state=state
  )
