"""A KV cache of a fixed number of slots, which a policy shares out.

Shapes never change: one compilation serves every length, and a donated cache is
written in place, one slot a step. What leaves and what stays is the policy's
(`policy`, `policies`); each key head of each sequence decides for itself. With
as many slots as tokens every policy equals the full cache, bit for bit.

Letters: B batch, T new tokens, C slots, N query heads, K key and value heads,
G = N / K, H head size.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from joma.inference import cache_options
from joma.inference import policy as policy_lib
from joma.inference import prompts
from joma.inference import slot_arrays
from joma.inference import storage
from joma.transformer import attention
from joma.transformer import config as configs
from joma.transformer import one_query
from kernels_pallas import implementations
from kernels_pallas.heavy_hitter_decode import api
from kernels_pallas.heavy_hitter_decode import rule as kernel_rule
from kernels_pallas.heavy_hitter_decode import slots as kernel_slots
from scansnap_jax.experiment import require


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotCache:
  """Slots of one layer; an `attention.KVCache`.

  Attributes:
    key: `storage.Stored` [B, K, C, H].
    value: As key.
    score: Float32 [B, K, C], the policy's.
    pos: Int32 [B, K, C], the token's position; -1 is empty.
    rank: Int32 [B, K, C], its place among those kept; None if not rolled.
    aux: The policy's arrays, [B, K, C, ...] each.
    state: The policy's arrays, [B, ...] each.
    policy: Static, with its sizes set.
    options: Static.
    layer: Static.
    num_groups: G, static.
  """

  key: Any
  value: Any
  score: Any
  pos: Any
  rank: Any
  aux: Any
  state: Any
  policy: Any = dataclasses.field(metadata={"static": True})
  options: Any = dataclasses.field(metadata={"static": True})
  layer: Any = dataclasses.field(metadata={"static": True})
  num_groups: Any = dataclasses.field(metadata={"static": True})

  @property
  def capacity(self) -> int:
    """C."""
    return self.pos.shape[2]

  def attend(
      self,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      positions: Int[Array, "B T"],
      rotate: attention.Rotate,
      options: attention.AttentionOptions,
  ) -> tuple[Float[Array, "B T N H"], "SlotCache"]:
    """One token: a decode step. More: prompts, for an empty cache only.

    Prompts attend to all of their own tokens; then the policy chooses those
    that stay. Prompts to a cache that holds something give NaN: read what
    follows token by token.
    """
    if query.shape[1] == 1:
      step = _decode_fused if _is_fused(self, options) else _decode
      return step(self, query, key, value, positions, rotate, options)
    return _read(self, query, key, value, positions, rotate, options)


def init(
    policy: policy_lib.Policy,
    config: configs.TransformerConfig,
    batch_size: int,
    capacity: int,
    dtype: Any = jnp.float32,
    *,
    keys: Literal["rotated", "raw"] | None = None,
    positions: Literal["absolute", "rolled"] = "absolute",
    page_size: int = 1,
) -> tuple[Any, ...]:
  """Returns empty caches, one a layer.

  Args:
    policy: What leaves when all slots are taken.
    config: The model's.
    batch_size: B.
    capacity: C, slots a key head; on average, where the policy gives layers or
      heads different ones.
    dtype: Of keys and values as they are kept: a float type, or int8 with a
      scale a slot.
    keys: None is "raw" where positions are rolled or the rotary frequencies
      change with the length of the text (dynamic NTK, LongRoPE), else
      "rotated".
    positions: "rolled" counts among the kept tokens, as StreamingLLM does.
    page_size: A divisor of the capacity; above 1, eviction frees the page of
      least priority, all unprotected.

  Raises:
    UserError: If the sizes do not fit together, or rolled positions are asked
      of a model without rotary ones.
  """
  require.at_least("batch_size", batch_size, 1)
  options = cache_options.resolve(config, keys, positions, page_size)
  caches = []
  for layer, size in enumerate(policy.capacities(config.num_layers, capacity)):
    cache_options.check_capacity(size, config, options)
    sized = policy.with_capacity(size)
    own = sized.init_cache(config, layer, batch_size, size, dtype, options)
    if own is None:
      shape = (batch_size, config.num_kv_heads, size, config.head_dim)
      num_groups = config.num_heads // config.num_kv_heads
      own = init_layer(sized, layer, shape, num_groups, dtype, options)
    caches.append(own)
  return tuple(caches)


def init_layer(
    policy: policy_lib.Policy,
    layer: int,
    shape: tuple[int, int, int, int],
    num_groups: int,
    dtype: Any,
    options: cache_options.CacheOptions = cache_options.DEFAULT,
) -> SlotCache:
  """Returns the empty cache of one layer, of shape [B, K, C, H]."""
  batch, num_kv_heads, capacity, head_dim = shape
  zeros = jnp.zeros((batch, num_kv_heads, capacity))
  pos = jnp.full(zeros.shape, -1, jnp.int32)
  return SlotCache(
      key=storage.empty(shape, dtype),
      value=storage.empty(shape, dtype),
      score=zeros,
      pos=pos,
      # A copy: what is donated must not lie in one place twice.
      rank=jnp.copy(pos) if options.positions == "rolled" else None,
      aux=policy.init_aux(batch, num_kv_heads, capacity, num_groups),
      state=policy.init_state(batch, num_kv_heads, head_dim, num_groups),
      policy=policy,
      options=options,
      layer=layer,
      num_groups=num_groups,
  )


def view(cache: SlotCache) -> policy_lib.Slots:
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
    cache: SlotCache, position: Int[Array, "B"]
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


def compact(
    cache: SlotCache, capacity: int, position: Int[Array, "B"]
) -> SlotCache:
  """Keeps the slots of greatest priority, in the order of their positions.

  Off the hot path: all that stays is copied.

  Args:
    cache: Of one layer.
    capacity: New number of slots, fewer or more.
    position: Of each sequence's next token.

  Raises:
    UserError: If the policy protects more than that.
  """
  policy = cache.policy.with_capacity(capacity)
  index = prompts.best(
      policy, view(cache), position, min(capacity, cache.capacity)
  )
  kept = jax.tree.map(
      lambda x: slot_arrays.resize(slot_arrays.take(x, index), capacity),
      (cache.key, cache.value, cache.score, cache.aux),
  )
  pos = slot_arrays.resize(slot_arrays.take(cache.pos, index), capacity, -1)
  key, value, score, aux = kept
  rank = None if cache.rank is None else slot_arrays.ranks_of(pos)
  return dataclasses.replace(
      cache,
      key=key,
      value=value,
      score=score,
      pos=pos,
      rank=rank,
      aux=aux,
      policy=policy,
  )


def stats(
    cache: SlotCache, position: Int[Array, "B"]
) -> dict[str, Float[Array, "B K"]]:
  """Returns what is in a cache, a number a sequence and key head.

  Args:
    cache: Of one layer.
    position: Of each sequence's next token.

  Returns:
    occupancy, the share of slots taken; mean_age and max_age of the kept
    tokens in positions; kept_mass, the share of all attention so far (N / K
    a query) that went to tokens still kept: NaN unless the policy's score is
    a sum of it, as `policies.H2O`'s.
  """
  is_kept = cache.pos >= 0
  count = is_kept.sum(axis=-1)
  age = jnp.where(is_kept, position[:, None, None] - cache.pos, 0)
  return {
      "occupancy": count / cache.capacity,
      "mean_age": age.sum(axis=-1) / jnp.maximum(count, 1),
      "max_age": age.max(axis=-1).astype(jnp.float32),
      "kept_mass": cache.policy.kept_mass(view(cache), position),
  }


def _is_fused(cache: SlotCache, options: attention.AttentionOptions) -> bool:
  """Whether one kernel does the whole step, where kernels run."""
  chosen = implementations.choose(options.implementation, {"tpu": "pallas_tpu"})
  is_plain = cache.options == cache_options.DEFAULT
  has_kernel = cache.policy.kernel_options() is not None
  # The kernel writes whole tiles of memory: 32 bytes of rows.
  has_tiles = cache.capacity * cache.key.data.dtype.itemsize % 32 == 0
  return chosen == "pallas_tpu" and is_plain and has_kernel and has_tiles


def _decode_fused(cache, query, key, value, positions, rotate, options):
  kept = kernel_slots.Slots(
      key=cache.key.data,
      value=cache.value.data,
      score=cache.score,
      pos=cache.pos,
      key_scale=cache.key.scale,
      value_scale=cache.value.scale,
  )
  out, kept, _ = api.heavy_hitter_decode(
      rotate(query, positions)[:, 0],
      rotate(key, positions)[:, 0],
      value[:, 0],
      kept,
      positions[:, 0],
      scale=options.scale,
      logits_soft_cap=options.logits_soft_cap,
      window=options.window,
      implementation="pallas_tpu",
      **cache.policy.kernel_options(),
  )
  cache = dataclasses.replace(
      cache,
      key=storage.Stored(kept.key, kept.key_scale),
      value=storage.Stored(kept.value, kept.value_scale),
      score=kept.score,
      pos=kept.pos,
  )
  return out[:, None], cache


def _decode(cache, query, key, value, positions, rotate, options):
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
  step = policy_lib.Step(attn_logits, jax.nn.softmax(attn_logits), position)
  score, aux, state = cache.policy.observe(view(cache), step)
  cache = dataclasses.replace(cache, score=score, aux=aux, state=state)
  return out, where_active(is_active, cache, old)


def _read(cache, query, key, value, positions, rotate, options):
  policy, capacity = cache.policy, cache.capacity
  result, prompt = prompts.read(
      policy,
      cache.layer,
      capacity,
      cache.options.keys == "raw",
      query,
      key,
      value,
      positions,
      rotate,
      options,
  )
  was_empty = (cache.pos < 0).all()
  cache = _keep(cache, prompt)
  out = jnp.where(was_empty, result.out, jnp.nan)
  if not policy.evicts:
    overflows = prompt.lengths > capacity
    out = jnp.where(overflows[:, None, None, None], jnp.nan, out)
  return out, cache


def _keep(cache: SlotCache, prompt: policy_lib.Prompt) -> SlotCache:
  """Chooses among the tokens of a prompt."""
  score, aux, state = cache.policy.read_prompt(prompt)
  key, value = prompt.key.swapaxes(1, 2), prompt.value.swapaxes(1, 2)
  pos = jnp.broadcast_to(prompt.positions[:, None], key.shape[:3])
  seq_len, capacity = pos.shape[2], cache.capacity
  kept = (key, value, score, aux)
  if seq_len > capacity:
    slots = policy_lib.Slots(
        key, value, score, pos, aux, state, cache.layer, cache.num_groups
    )
    index = prompts.best(cache.policy, slots, prompt.lengths, capacity)
    kept, pos = jax.tree.map(lambda x: slot_arrays.take(x, index), (kept, pos))
  fit = lambda x: slot_arrays.resize(x, capacity)
  key, value, score, aux = jax.tree.map(fit, kept)
  pos = slot_arrays.resize(pos, capacity, -1).astype(jnp.int32)
  return dataclasses.replace(
      cache,
      key=storage.write(cache.key, key),
      value=storage.write(cache.value, value),
      score=score,
      pos=pos,
      rank=None if cache.rank is None else slot_arrays.ranks_of(pos),
      aux=aux,
      state=state,
  )


def _write(cache, token, slot, freed) -> SlotCache:
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


def where_active(
    is_active: Bool[Array, "B"], new: SlotCache, old: SlotCache
) -> SlotCache:
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
