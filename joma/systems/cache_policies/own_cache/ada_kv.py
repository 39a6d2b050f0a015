"""Heads of a layer share its slots out after the prompt.

Letters: B batch, T new tokens, K key and value heads, G query heads of each, C
slots a head on average, M = K C slots of a layer, H head size.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from joma.inference.cache import cache_options
from joma.inference.cache import kv_cache
from joma.inference.cache import policy as policy_lib
from joma.inference.cache import prompts
from joma.inference.cache import slot_arrays
from joma.inference.cache import slot_step
from joma.inference.cache import storage
from joma.transformer import attention
from joma.transformer import one_query
from scansnap_jax.experiment import errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaKV(policy_lib.Policy):
  """One choice over all heads of a layer, after the prompt (arXiv 2407.11550).

  Heads whose attention is spread get more slots than those that look at little.
  A head's slots are its own from then on.

  Attributes:
    base: Whose priority is compared across heads; not one that ties the heads
      of a layer together, as TOVA does.
    floor: Share of the average budget that every head gets.
  """

  label: ClassVar[str] = "AdaKV"
  base: policy_lib.Policy
  floor: float = 0.2
  ranks_heads_alone: ClassVar[bool] = False

  def __post_init__(self):
    super().__post_init__()
    if not 0 <= self.floor <= 1:
      raise errors.UserError(f"floor={self.floor} must be in [0, 1].")
    if not self.base.ranks_heads_alone:
      raise errors.UserError(
          f"base={type(self.base).__name__} has no priority of each head alone."
      )

  def with_capacity(self, capacity):
    """Protects what the base protects."""
    base = self.base.with_capacity(capacity)
    return dataclasses.replace(
        self, base=base, num_sinks=base.num_sinks, num_recent=base.num_recent
    )

  def capacities(self, num_layers, capacity):
    """Those of the base."""
    return self.base.capacities(num_layers, capacity)

  def least(self, capacity: int) -> int:
    """Slots that every head gets."""
    protected = self.base.num_sinks + (self.base.num_recent or 0) + 1
    return max(int(self.floor * capacity), protected)

  def init_cache(self, config, layer, batch_size, capacity, dtype, options):
    """Returns a `PooledCache` of K C slots."""
    if options != cache_options.DEFAULT:
      raise errors.UserError(
          "AdaKV keeps rotated keys at absolute positions, slot by slot: leave"
          " keys, positions and page_size as they are."
      )
    num_kv_heads = config.num_kv_heads
    shape = (batch_size, 1, num_kv_heads * capacity, config.head_dim)
    num_groups = config.num_heads // num_kv_heads
    pool = kv_cache.init_layer(
        self.base, layer, shape, num_groups, dtype, options
    )
    state = self.base.init_state(
        batch_size, num_kv_heads, config.head_dim, num_groups
    )
    owner = jnp.repeat(jnp.arange(num_kv_heads), capacity)
    owner = jnp.broadcast_to(owner[None], (batch_size, len(owner)))
    pool = dataclasses.replace(pool, state=state)
    return PooledCache(pool, owner, self, num_kv_heads)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PooledCache:
  """The slots of a layer, each owned by a head; an `attention.KVCache`.

  Attributes:
    pool: `kv_cache.SlotCache` of one head with M slots.
    owner: Int32 [B, M], the key head of a slot.
    policy: `AdaKV`, static.
    num_kv_heads: K, static.
  """

  pool: Any
  owner: Any
  policy: Any = dataclasses.field(metadata={"static": True})
  num_kv_heads: Any = dataclasses.field(metadata={"static": True})

  @property
  def capacity(self) -> int:
    """C, slots of a head on average."""
    return self.owner.shape[1] // self.num_kv_heads

  def kept_positions(self) -> Int[Array, "B K M"]:
    """Positions that each head keeps, -1 in slots that are not its own."""
    return jnp.where(self._is_mine(), self.pool.pos, -1)

  def attend(
      self,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      positions: Int[Array, "B T"],
      rotate: attention.Rotate,
      options: attention.AttentionOptions,
  ) -> tuple[Float[Array, "B T N H"], "PooledCache"]:
    """As `kv_cache.SlotCache.attend`."""
    if query.shape[1] > 1:
      return self._read(query, key, value, positions, rotate, options)
    return self._decode(query, key, value, positions, rotate, options)

  def budgets(self) -> Int[Array, "B K"]:
    """Slots of each head."""
    return self._is_mine().sum(axis=-1)

  def _is_mine(self) -> Bool[Array, "B K M"]:
    heads = jnp.arange(self.num_kv_heads)[None, :, None]
    return self.owner[:, None] == heads

  def _view(self) -> policy_lib.Slots:
    """All slots for each head; those of others look empty."""
    mine = self._is_mine()
    everywhere = lambda x: jnp.broadcast_to(
        x, (x.shape[0], self.num_kv_heads, *x.shape[2:])
    )
    slots = slot_step.view(self.pool)
    own = lambda x, fill: jnp.where(mine, everywhere(x), fill)
    return dataclasses.replace(
        slots,
        key=everywhere(slots.key),
        value=everywhere(slots.value),
        score=own(slots.score, 0.0),
        pos=own(slots.pos, -1),
        aux=jax.tree.map(everywhere, slots.aux),
    )

  def _joined(self, x) -> Array:
    """Takes from [B, K, M, ...] what each slot's owner has: [B, 1, M, ...]."""
    index = slot_arrays.like(self.owner[:, None], x)
    return jnp.take_along_axis(x, index, axis=1)

  def _decode(self, query, key, value, positions, rotate, options):
    pool, base, position = self.pool, self.policy.base, positions[:, 0]
    is_active = position >= 0
    token = policy_lib.Token(
        key=rotate(key, positions)[:, 0],
        value=value[:, 0],
        raw_query=query.reshape(
            len(query), self.num_kv_heads, -1, query.shape[-1]
        ),
        position=position,
        rotate=rotate,
        scale=options.scale,
        layer=pool.layer,
    )
    cache = dataclasses.replace(self, pool=self._write(token, is_active))
    slots = cache._view()
    is_seen = slots.pos >= 0
    if options.window is not None:
      is_seen &= slots.pos > (position - options.window)[:, None, None]
    out, attn_logits = cache._attend(
        rotate(query, positions), slots, is_seen, options
    )
    step = policy_lib.Step(attn_logits, jax.nn.softmax(attn_logits), position)
    score, aux, state = base.observe(slots, step)
    after = dataclasses.replace(
        cache.pool,
        score=cache._joined(score),
        aux=jax.tree.map(cache._joined, aux),
        state=state,
    )
    return out, dataclasses.replace(
        self, pool=slot_step.where_active(is_active, after, pool)
    )

  def _attend(self, query, slots, is_seen, options) -> tuple[Array, Array]:
    """Before a prompt has shared the slots out, as if each head had its own.

    Then a head reads C slots and not M, and the bits are those of a full cache.
    """
    num_kv_heads, capacity = self.num_kv_heads, self.pool.capacity
    heads = jnp.arange(num_kv_heads)
    even = jnp.repeat(heads, capacity // num_kv_heads)

    def of_each():
      split = lambda x: x.reshape(len(x), num_kv_heads, -1, *x.shape[3:])
      own = lambda x: split(x[:, :1])
      out, attn_logits = one_query.attend(
          query,
          own(slots.key),
          own(slots.value),
          own(is_seen.any(axis=1, keepdims=True)),
          options,
      )
      is_own = (even[None] == heads[:, None])[None, :, None]
      everywhere = jnp.tile(attn_logits, num_kv_heads)
      return out, jnp.where(is_own, everywhere, -jnp.inf)

    return jax.lax.cond(
        (self.owner == even[None]).all(),
        of_each,
        lambda: one_query.attend(
            query, slots.key, slots.value, is_seen, options
        ),
    )

  def _write(self, token, is_active) -> kv_cache.SlotCache:
    """Each head replaces one of its own slots."""
    pool, base = self.pool, self.policy.base
    ranks = policy_lib.rank(base, self._view(), token.position)
    # Protected slots of one's own come before those of others.
    ranks = jnp.where(self._is_mine(), jnp.minimum(ranks, 3e38), jnp.inf)
    slot = jnp.argmin(ranks, axis=-1)
    slot = jnp.where(is_active[:, None], slot, pool.capacity)
    score, aux, state = base.enter(token, pool.state)
    rows = jnp.arange(len(slot))[:, None]
    put = lambda x, new: x.at[rows, 0, slot].set(
        new.astype(x.dtype), mode="drop"
    )
    return dataclasses.replace(
        pool,
        key=storage.put(pool.key, token.key, put),
        value=storage.put(pool.value, token.value, put),
        score=put(pool.score, score),
        pos=put(
            pool.pos, jnp.broadcast_to(token.position[:, None], slot.shape)
        ),
        aux=jax.tree.map(put, pool.aux, aux),
        state=state,
    )

  def _read(self, query, key, value, positions, rotate, options):
    """A prompt, into an empty cache."""
    capacity = self.pool.capacity // self.num_kv_heads
    base = self.policy.base
    room = max(capacity, key.shape[1])
    result, prompt = prompts.read(
        base,
        self.pool.layer,
        room,
        False,
        query,
        key,
        value,
        positions,
        rotate,
        options,
    )
    score, aux, state = base.read_prompt(prompt)
    pos = jnp.broadcast_to(positions[:, None], score.shape)
    slots = policy_lib.Slots(
        prompt.key.swapaxes(1, 2),
        value.swapaxes(1, 2),
        score,
        pos,
        aux,
        state,
        self.pool.layer,
        self.pool.num_groups,
    )
    fit = lambda x, fill=0.0: slot_arrays.resize(x, room, fill)
    arrays = jax.tree.map(fit, (slots.key, slots.value, score, aux))
    ranks = fit(policy_lib.rank(base, slots, prompt.lengths), -np.inf)
    index = self._share(ranks, capacity)  # [B, M] into K room.
    flat = lambda x: x.reshape(x.shape[0], 1, -1, *x.shape[3:])
    chosen = lambda x: jnp.take_along_axis(
        flat(x), slot_arrays.like(index[:, None], flat(x)), axis=2
    )
    key, value, score, aux = jax.tree.map(chosen, arrays)
    pool = dataclasses.replace(
        self.pool,
        key=storage.write(self.pool.key, key),
        value=storage.write(self.pool.value, value),
        score=score,
        pos=chosen(fit(pos, -1)).astype(jnp.int32),
        aux=aux,
        state=state,
    )
    out = jnp.where((self.pool.pos < 0).all(), result.out, jnp.nan)
    owner = (index // room).astype(self.owner.dtype)
    return out, dataclasses.replace(self, pool=pool, owner=owner)

  def _share(self, ranks, capacity) -> Int[Array, "B M"]:
    """Which of [K, room] stay: each head's best few, then the best of all."""
    batch, num_kv_heads, room = ranks.shape
    place = jnp.arange(room)[None, None]
    # A short prompt leaves each head as many empty slots: the first ones.
    ranks = jnp.where(jnp.isneginf(ranks) & (place < capacity), -3e38, ranks)
    least = min(self.policy.least(capacity), capacity)
    order = jnp.argsort(jnp.argsort(-ranks, axis=-1), axis=-1)
    flat = jnp.where(order < least, jnp.inf, ranks).reshape(batch, -1)
    index = jax.lax.top_k(flat, num_kv_heads * capacity)[1]
    return jnp.sort(index, axis=-1)
