"""The pages of a layer, shared out among heads with budgets of their own.

A head computes over what it owns: its pages are a row of
`kernels_pallas.decode.paged`, where the policy's rule is one that rows can
have. Other policies take each head over all pages, K times the products.

Letters: B batch, T new tokens, K key and value heads, G query heads of each, C
slots a head on average, P pages of S slots, M = P S, H head size.
"""

import abc
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped
import numpy as np

from joma.inference.cache import calls
from joma.inference.cache import kv_cache
from joma.inference.cache import policy as policy_lib
from joma.inference.cache import prompts
from joma.inference.cache import slot_arrays
from joma.inference.cache import slot_step
from joma.inference.cache import storage
from joma.inference.cache import tokens
from joma.transformer import hooks
from joma.transformer import one_by_one
from joma.transformer.weighing import one_query
from kernels_pallas.decode import slots as kernel_slots
from kernels_pallas.decode.paged import api as paged

CLOSED = kernel_slots.CLOSED


def page_size_of(capacity: int, dtype: jax.typing.DTypeLike) -> int:
  """S: the least that a TPU moves, or more if that is a sixteenth of C."""
  least = 32 if jnp.dtype(dtype) == jnp.int8 else paged.MIN_PAGE_SIZE
  fitting = [size for size in (32, 64, 128) if 16 * size <= capacity]
  return max([least, *fitting])


def layout(
    budgets: Int[Array, "B K"], page_size: int, num_slots: int
) -> tuple[Int[Array, "B M"], Int[Array, "B M"]]:
  """Which of a sequence's K C tokens each slot has, and which head owns it.

  Tokens are sorted by head; -1 and K where a slot is closed.
  """
  num_pages = -(-budgets // page_size)
  slot = jnp.arange(num_slots)[None, None]
  first_slot = page_size * (jnp.cumsum(num_pages, axis=1) - num_pages)
  first_token = jnp.cumsum(budgets, axis=1) - budgets
  within = slot - first_slot[..., None]
  is_mine = (within >= 0) & (within < budgets[..., None])
  token = jnp.where(is_mine, within + first_token[..., None], -1).max(axis=1)
  heads = jnp.arange(budgets.shape[1])[None, :, None]
  owner = jnp.where(is_mine, heads, budgets.shape[1]).min(axis=1)
  return token, owner


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharesOut(policy_lib.Policy):
  """A policy by which heads share slots out.

  Attributes:
    base: Whose priority is compared across heads.
  """

  base: policy_lib.Policy
  ranks_heads_alone: ClassVar[bool] = False

  @abc.abstractmethod
  def least(self, capacity: int) -> int:
    """Slots that every head gets, of a capacity."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PooledCache:
  """Pages of a layer, each of one head; a `hooks.KVCache`.

  A head's pages follow each other, in the order of heads. What is left of its
  last page is closed: nobody's, for good.

  Attributes:
    pool: `kv_cache.SlotCache` of one head with P S slots.
    budgets: Int32 [B, K], slots of each head.
    policy: `AdaKV`, static.
    capacity: C, slots of a head on average, static.
    page_size: S, static.
  """

  pool: kv_cache.SlotCache
  budgets: storage.Leaf
  policy: SharesOut = dataclasses.field(metadata={"static": True})
  capacity: int = dataclasses.field(metadata={"static": True})
  page_size: int = dataclasses.field(metadata={"static": True})

  @property
  def num_kv_heads(self) -> int:
    """K."""
    return self.budgets.shape[1]

  def reads_call(self) -> bool:
    """Whether the policy looks at the layer's input."""
    return calls.uses_input(self.policy.base)

  @property
  def owner(self) -> Int[Array, "B M"]:
    """The key head of each slot; K where closed."""
    return layout(self.budgets, self.page_size, self.pool.capacity)[1]

  def attend(
      self,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      positions: Int[Array, "B T"],
      rotate: hooks.Rotate,
      options: hooks.AttentionOptions,
  ) -> tuple[Float[Array, "B T N H"], "PooledCache"]:
    """As `kv_cache.SlotCache.attend`."""
    new = tokens.Tokens(query, key, value, positions, rotate, options)
    if query.shape[1] > 1:
      return one_by_one.unless_new(
          (self.pool.pos < 0).all(),
          lambda: self._read(new),
          PooledCache.attend,
          self,
          *new.arguments,
      )
    # Before a prompt has shared the slots out the bits are the base's.
    return jax.lax.cond(
        (self.budgets == self.capacity).all(),
        lambda: self._decode_evenly(new),
        lambda: self._decode(new),
    )

  def kept_positions(self) -> Int[Array, "B K M"]:
    """Positions that each head keeps, -1 in slots that are not its own."""
    return jnp.where(self._is_mine(), self.pool.pos, -1)

  def _is_mine(self) -> Bool[Array, "B K M"]:
    heads = jnp.arange(self.num_kv_heads)[None, :, None]
    return self.owner[:, None] == heads

  def _num_pages(self) -> Int[Array, "B K"]:
    return -(-self.budgets // self.page_size)

  def _first_page(self) -> Int[Array, "B K"]:
    num_pages = self._num_pages()
    return jnp.cumsum(num_pages, axis=1) - num_pages

  def _decode_evenly(
      self, new: tokens.Tokens
  ) -> tuple[Float[Array, "B 1 N H"], "PooledCache"]:
    """As the base does with C slots for each head."""
    pool, heads = self.pool, self.num_kv_heads
    room = -(-self.capacity // self.page_size) * self.page_size
    slots = lambda x: x[:, 0, : heads * room]
    apart = lambda x: slots(x).reshape(len(x), heads, room, *x.shape[3:])
    arrays = lambda cache: (
        cache.key,
        cache.value,
        cache.score,
        cache.pos,
        cache.aux,
    )
    names = ("key", "value", "score", "pos", "aux")
    split = jax.tree.map(
        lambda x: apart(x)[:, :, : self.capacity], arrays(pool)
    )
    cache = dataclasses.replace(pool, **dict(zip(names, split, strict=True)))
    out, cache = slot_step.decode(cache, new)
    back = lambda x, kept: x.at[:, 0, : heads * room].set(
        apart(x).at[:, :, : self.capacity].set(kept).reshape(slots(x).shape)
    )
    joined = jax.tree.map(back, arrays(pool), arrays(cache))
    pool = dataclasses.replace(cache, **dict(zip(names, joined, strict=True)))
    return out, dataclasses.replace(self, pool=pool)

  def _decode(
      self, new: tokens.Tokens
  ) -> tuple[Float[Array, "B 1 N H"], "PooledCache"]:
    """Over pages, if the base is a rule of rows; else each head over all."""
    rule = calls.kernel_options(self.policy.base)
    if rule is None or not paged.can_hold(rule):
      return self._decode_of_all(new)
    pool, size = self.pool, self.page_size
    batch, _, capacity = pool.pos.shape
    pages = lambda x: None if x is None else x.reshape(-1, size, *x.shape[3:])
    page = jnp.arange(capacity // size)
    # Pages of a sequence lie together, and so do those of a head.
    first = self._first_page() + page.size * jnp.arange(batch)[:, None]
    table = first.reshape(-1, 1) + page[None]
    out, kept, _ = paged.decode_step(
        new.rotated_query[:, 0],
        new.rotated_key[:, 0],
        new.value[:, 0],
        kernel_slots.Slots(
            key=pages(pool.key.data),
            value=pages(pool.value.data),
            score=pages(pool.score),
            pos=pages(pool.pos),
            key_scale=pages(pool.key.scale),
            value_scale=pages(pool.value.scale),
        ),
        table.astype(jnp.int32),
        self._num_pages().reshape(-1),
        new.positions[:, 0],
        scale=new.options.scale,
        logits_soft_cap=new.options.logits_soft_cap,
        window=new.options.window,
        **rule,
    )
    whole = lambda x: (
        None if x is None else x.reshape(batch, 1, capacity, *x.shape[2:])
    )
    pool = dataclasses.replace(
        pool,
        key=storage.Stored(whole(kept.key), whole(kept.key_scale)),
        value=storage.Stored(whole(kept.value), whole(kept.value_scale)),
        score=whole(kept.score),
        pos=whole(kept.pos),
    )
    return out[:, None], dataclasses.replace(self, pool=pool)

  def _decode_of_all(
      self, new: tokens.Tokens
  ) -> tuple[Float[Array, "B 1 N H"], "PooledCache"]:
    pool, base = self.pool, self.policy.base
    options, position = new.options, new.positions[:, 0]
    is_active = position >= 0
    token, cache = new.one(pool.layer), self._without_freed(position)
    cache = dataclasses.replace(self, pool=cache._write(token, is_active))
    slots = cache._view()
    is_seen = slots.pos >= 0
    if options.window is not None:
      is_seen &= slots.pos > (position - options.window)[:, None, None]
    out, attn_logits = one_query.attend(
        new.rotated_query, slots.key, slots.value, is_seen, options
    )
    step = policy_lib.Step(attn_logits, jax.nn.softmax(attn_logits), position)
    score, aux, state = calls.observe(base, slots, step)
    after = dataclasses.replace(
        cache.pool,
        score=cache._joined(score),
        aux=jax.tree.map(cache._joined, aux),
        state=state,
    )
    return out, dataclasses.replace(
        self, pool=slot_step.where_active(is_active, after, pool)
    )

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

  def _without_freed(self, position: Int[Array, "B"]) -> "PooledCache":
    """Empties what the base has no use for from `position` on."""
    slots = self._view()
    pos = calls.still_kept(self.policy.base, slots, position)
    if pos is slots.pos:
      return self
    freed = ((slots.pos >= 0) & (pos < 0)).any(axis=1, keepdims=True)
    pos = jnp.where(freed, kernel_slots.EMPTY, self.pool.pos)
    return dataclasses.replace(
        self, pool=dataclasses.replace(self.pool, pos=pos)
    )

  def _joined(
      self, x: Shaped[Array, "B K M ..."]
  ) -> Shaped[Array, "B 1 M ..."]:
    """Takes from [B, K, M, ...] what each slot's owner has: [B, 1, M, ...]."""
    # Of closed slots anything will do: the last head's.
    owner = jnp.minimum(self.owner, self.num_kv_heads - 1)
    index = slot_arrays.like(owner[:, None], x)
    return jnp.take_along_axis(x, index, axis=1)

  def _write(
      self, token: policy_lib.Token, is_active: Bool[Array, "B"]
  ) -> kv_cache.SlotCache:
    """Each head replaces one of its own slots."""
    pool, base = self.pool, self.policy.base
    ranks = calls.rank(base, self._view(), token.position)
    # Protected slots of one's own come before those of others.
    ranks = jnp.where(self._is_mine(), jnp.minimum(ranks, 3e38), jnp.inf)
    slot = jnp.argmin(ranks, axis=-1)
    slot = jnp.where(is_active[:, None], slot, pool.capacity)
    score, aux, state = calls.enter(base, token, pool.state)
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

  def _read(
      self, new: tokens.Tokens
  ) -> tuple[Float[Array, "B T N H"], "PooledCache"]:
    """A first prompt."""
    capacity, base = self.capacity, self.policy.base
    room = max(capacity, new.key.shape[1])
    result, prompt = prompts.read(
        new, base, layer=self.pool.layer, capacity=room, is_raw=False
    )
    # All tokens are ranked as if each head had room for everything: heads
    # can be compared only by what the base says of tokens that still exist.
    score, aux, state = calls.read_prompt(base, prompt)
    pos = jnp.broadcast_to(new.positions[:, None], score.shape)
    slots = policy_lib.Slots(
        prompt.key.swapaxes(1, 2),
        new.value.swapaxes(1, 2),
        score,
        pos,
        aux,
        state,
        self.pool.layer,
        self.pool.num_groups,
    )
    fit = lambda x, fill=0.0: slot_arrays.resize(x, room, fill)
    arrays = jax.tree.map(fit, (slots.key, slots.value, score, aux))
    ranks = fit(calls.rank(base, slots, prompt.lengths), -np.inf)
    # One choice over the layer's K heads, [B, K C] of their K x room tokens;
    # sorted, so that tokens of a head follow each other, oldest first.
    chosen = self._share(ranks, capacity)
    heads = jnp.arange(self.num_kv_heads)[None, :, None]
    budgets = (chosen[:, None] // room == heads).sum(axis=-1)
    # A head begins on a page of its own: its last page may have slots left,
    # which stay closed, for pages cannot be shared between two heads' rows.
    index, _ = layout(budgets, self.page_size, self.pool.capacity)
    is_closed = index < 0
    index = jnp.take_along_axis(chosen, jnp.maximum(index, 0), axis=1)
    flat = lambda x: x.reshape(x.shape[0], 1, -1, *x.shape[3:])
    laid_out = lambda x: jnp.take_along_axis(
        flat(x), slot_arrays.like(index[:, None], flat(x)), axis=2
    )
    key, value, score, aux = jax.tree.map(laid_out, arrays)
    pos = laid_out(fit(pos, -1)).astype(jnp.int32)
    pool = dataclasses.replace(
        self.pool,
        key=storage.write(self.pool.key, key),
        value=storage.write(self.pool.value, value),
        score=score,
        pos=jnp.where(is_closed[:, None], CLOSED, pos),
        aux=aux,
        state=state,
    )
    budgets = budgets.astype(jnp.int32)
    return result.out, dataclasses.replace(self, pool=pool, budgets=budgets)

  def _share(
      self, ranks: Float[Array, "B K R"], capacity: int
  ) -> Int[Array, "B _"]:
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
