"""What a policy keeps, in four bits a number; the newest as they are.

Letters: B batch, T new tokens, N query heads, K key and value heads, C slots,
S slots in whole groups, R exact ones, g numbers of a group, H head size.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from joma.inference.cache import cache_options
from joma.inference.cache import calls
from joma.inference.cache import kv_cache
from joma.inference.cache import policy as policy_lib
from joma.inference.cache import slot_arrays
from joma.inference.cache import slot_step
from joma.inference.cache import storage
from joma.inference.cache import tokens
from joma.inference.cost import cache_plan
from joma.systems.cache_policies import names
from joma.systems.cache_policies.own_cache import blocks
from joma.systems.cache_policies.own_cache import coding
from joma.systems.cache_policies.own_cache import int4
from joma.transformer import config as configs
from joma.transformer import hooks
from joma.transformer import one_by_one
from scansnap_jax.experiment import errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodedSlots(policy_lib.Policy):
  """Slots of another policy in the codes of KIVI (2402.02750).

  The base chooses what leaves, by keys and values as they are read back. Keys
  have a scale and an offset for each channel of `group_size` slots, values for
  each slot's `group_size` channels, or all where these do not divide the head.
  New tokens stand as they are until `num_exact` do; then all of them are coded,
  their values once and for all, their keys together with those of the slots
  between them, which are rounded once more. A prompt attends to its own tokens
  as they are; of what it leaves, the last slots short of `num_exact` stay so.

  Paper's settings: KIVI's groups of 32, at 2 bits.

  Attributes:
    base: Which chooses what stays.
    num_exact: R; with fewer slots nothing is coded.
    group_size: g, a divisor of `num_exact`.
  """

  label: ClassVar[str] = "Four bits of"
  ranks_heads_alone: ClassVar[bool] = False
  base: policy_lib.Policy
  num_exact: int = 32
  group_size: int = 32

  def __post_init__(self):
    super().__post_init__()
    coding.check_sizes(self.num_exact, self.group_size)
    base = names.name_of(self.base)
    if calls.has_own_cache(self.base) or not self.base.evicts:
      raise errors.UserError(
          f"four_bits:{base}: {base} keeps tokens in its own way; give a policy"
          f" that evicts from slots, as four_bits:{names.COMPARED[0]}, or kivi"
          " for all tokens."
      )
    if calls.merges(self.base):
      raise errors.UserError(
          f"four_bits:{base}: {base} changes values that are coded already;"
          f" give a policy that leaves them, as four_bits:{names.COMPARED[0]}."
      )

  def wrapped(self) -> tuple[policy_lib.Policy, ...]:
    """The base."""
    return (self.base,)

  def sized(self, capacity: int) -> policy_lib.Policy:
    """Protects what the base protects."""
    base = self.base.with_capacity(capacity)
    return dataclasses.replace(
        self, base=base, num_sinks=base.num_sinks, num_recent=base.num_recent
    )

  def fitted(self, slots: int, named: frozenset[str]) -> policy_lib.Policy:
    """Fits the base."""
    base = calls.fitted(self.base, slots, named)
    return dataclasses.replace(self, base=base)

  def capacities(self, num_layers: int, capacity: int) -> tuple[int, ...]:
    """Those of the base."""
    return calls.capacities(self.base, num_layers, capacity)

  def plan(
      self, capacities: tuple[int, ...], name: str
  ) -> cache_plan.CachePlan:
    """The base's, coded."""
    coded = cache_plan.CodedSlots(self.num_exact, self.group_size)
    plan = calls.plan(self.base, capacities, name)
    return dataclasses.replace(plan, coding=coded)

  def init_cache(
      self,
      config: configs.TransformerConfig,
      layer: int,
      batch_size: int,
      capacity: int,
      dtype: jax.typing.DTypeLike,
      options: cache_options.CacheOptions,
  ) -> "CodedCache":
    """Returns a `CodedCache` of `capacity` slots a head."""
    blocks.check_made("four_bits", config, layer, dtype, options)
    coding.check_heads("four_bits", config)
    shape = (batch_size, config.num_kv_heads, capacity, config.head_dim)
    num_groups = config.num_heads // config.num_kv_heads
    return init_layer(self, layer, shape, num_groups, dtype)


def init_layer(
    policy: CodedSlots,
    layer: int,
    shape: tuple[int, int, int, int],
    num_groups: int,
    dtype: jax.typing.DTypeLike,
) -> "CodedCache":
  """Returns the empty cache of one layer, of shape [B, K, C, H].

  One program makes those of all layers.
  """
  cache = _empty(policy, shape, num_groups, dtype)
  slots = dataclasses.replace(cache.slots, layer=layer)
  return dataclasses.replace(cache, slots=slots)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _empty(
    policy: CodedSlots,
    shape: tuple[int, int, int, int],
    num_groups: int,
    dtype: jax.typing.DTypeLike,
) -> "CodedCache":
  *lead, capacity, head_dim = shape
  size = policy.group_size
  whole = (*lead, -(-capacity // size) * size, head_dim)
  slots = kv_cache.init_layer(policy.base, 0, shape, num_groups, dtype)
  recent = lambda: jnp.zeros((*lead, policy.num_exact, head_dim), dtype)
  key, value = coding.empty(whole, size, dtype)
  return CodedCache(
      key=key,
      value=value,
      recent_key=recent(),
      recent_value=recent(),
      owner=jnp.full((*lead, policy.num_exact), -1, jnp.int32),
      slots=_bare(slots),
      policy=policy,
  )


def _bare(slots: kv_cache.SlotCache) -> kv_cache.SlotCache:
  """Slots without keys and values."""
  nothing = storage.Stored(None)
  return dataclasses.replace(slots, key=nothing, value=nothing)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CodedCache:
  """A `hooks.KVCache`.

  Attributes:
    key: Codes of S slots, leaves [B, K, S, ...].
    value: Likewise.
    recent_key: [B, K, R, H], as they are.
    recent_value: Likewise.
    owner: Int32 [B, K, R], the slot of each exact one; -1 is none.
    slots: All else of the base's slots.
    policy: Static.
  """

  key: int4.Codes
  value: int4.Codes
  recent_key: storage.Leaf
  recent_value: storage.Leaf
  owner: storage.Leaf
  slots: kv_cache.SlotCache
  policy: CodedSlots = dataclasses.field(metadata={"static": True})
  honours: ClassVar[tuple[str, ...]] = kv_cache.SlotCache.honours

  def num_positions(self) -> None:
    """None: tokens leave."""

  def reads_call(self) -> bool:
    """Whether the base looks at the layer's input."""
    return calls.uses_input(self.policy)

  def kept_positions(self) -> Int[Array, "B K C"]:
    """Positions that each head keeps, -1 in empty slots."""
    return self.slots.pos

  def attend(
      self,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      positions: Int[Array, "B T"],
      rotate: hooks.Rotate,
      options: hooks.AttentionOptions,
  ) -> tuple[Float[Array, "B T N H"], "CodedCache"]:
    """As the base's slots, with keys and values as they are read back."""
    new = tokens.Tokens(query, key, value, positions, rotate, options)
    if query.shape[1] == 1:
      out, slots = slot_step.decode(self._read(), new)
      return out, self._with_token(slots, positions[:, 0])
    return one_by_one.unless_new(
        (self.slots.pos < 0).all(),
        lambda: self._read_prompt(new),
        CodedCache.attend,
        self,
        *new.arguments,
    )

  def _read_prompt(
      self, new: tokens.Tokens
  ) -> tuple[Float[Array, "B T N H"], "CodedCache"]:
    out, slots = kv_cache.read(self._read(), new)
    taken, size = slots.pos >= 0, self.policy.num_exact
    # Slots up to the last one that is taken; what is freed lies between.
    numbers = slot_arrays.every_slot(slots.pos) + 1
    count = jnp.where(taken, numbers, 0).max(axis=-1, keepdims=True)
    owner = count // size * size + jnp.arange(size)[None, None]
    owner = jnp.where(owner < count, owner, -1)
    of_owner = jnp.maximum(owner, 0)
    recent = dataclasses.replace(
        self,
        recent_key=slot_arrays.take(slots.key.data, of_owner),
        recent_value=slot_arrays.take(slots.value.data, of_owner),
        owner=owner.astype(jnp.int32),
        slots=_bare(slots),
    )
    every = jnp.ones((*taken.shape[:2], self.key.data.shape[2]), bool)
    return out, recent._coded(slots, every)

  def _read(self) -> kv_cache.SlotCache:
    """The base's slots with all keys and values, exact ones as they are."""
    capacity = self.slots.capacity
    keys, values = coding.decode(self.key, self.value, self.policy.group_size)
    index = _index(jnp.where(self.owner < 0, capacity, self.owner))
    joined = lambda coded, recent: storage.Stored(
        coded[:, :, :capacity]
        .astype(recent.dtype)
        .at[index]
        .set(recent, mode="drop")
    )
    return dataclasses.replace(
        self.slots,
        key=joined(keys, self.recent_key),
        value=joined(values, self.recent_value),
    )

  def _with_token(
      self, slots: kv_cache.SlotCache, position: Int[Array, "B"]
  ) -> "CodedCache":
    """After a step that has put a token into one of the slots.

    Args:
      slots: After the step.
      position: Of each sequence's token; -1 is none.
    """
    is_new = slots.pos == position[:, None, None]
    is_new = is_new & (position >= 0)[:, None, None]
    slot = is_new.argmax(axis=-1)
    # A slot whose token was exact and has left keeps its place.
    mine, size = self.owner == slot[..., None], self.policy.num_exact
    place = jnp.where(
        mine.any(axis=-1),
        mine.argmax(axis=-1),
        (self.owner < 0).argmax(axis=-1),
    )
    place = _index(jnp.where(is_new.any(axis=-1), place, size)[..., None])
    put = lambda x, new: x.at[place].set(new, mode="drop")
    newest = lambda x: slot_arrays.take(x.data, slot[..., None])
    cache = dataclasses.replace(
        self,
        recent_key=put(self.recent_key, newest(slots.key)),
        recent_value=put(self.recent_value, newest(slots.value)),
        owner=put(self.owner, slot[..., None].astype(jnp.int32)),
        slots=_bare(slots),
    )
    is_full = (cache.owner >= 0).all(axis=-1)
    return jax.lax.cond(
        is_full.any(), lambda: cache._settled(slots, is_full), lambda: cache
    )

  def _settled(
      self, slots: kv_cache.SlotCache, is_full: Bool[Array, "B K"]
  ) -> "CodedCache":
    """Codes the exact ones of heads that have R of them."""
    missing = jnp.zeros((*is_full.shape, self.key.data.shape[2]), bool)
    index = _index(jnp.where(is_full[..., None], self.owner, missing.shape[2]))
    cache = self._coded(slots, missing.at[index].set(True, mode="drop"))
    owner = jnp.where(is_full[..., None], -1, self.owner)
    return dataclasses.replace(cache, owner=owner)

  def _coded(
      self, slots: kv_cache.SlotCache, is_new: Bool[Array, "B K S"]
  ) -> "CodedCache":
    """With new codes of such slots, and of keys that share their groups."""
    room, size = is_new.shape[2], self.policy.group_size
    dtype = self.recent_key.dtype
    key, value = (
        slot_arrays.resize(x.data, room) for x in (slots.key, slots.value)
    )
    taken = slot_arrays.resize(slots.pos, room, -1) >= 0
    groups = is_new.reshape(*is_new.shape[:2], -1, size).any(axis=-1)
    key = _without_empty(key, taken, size)
    key, value = coding.encode(key, value, size, dtype)
    fit = lambda x, mask: slot_arrays.like(mask, x)
    choose = lambda mask, new, old: jnp.where(fit(new, mask), new, old)
    wide = jnp.repeat(groups, size, axis=-1)
    return dataclasses.replace(
        self,
        key=int4.Codes(
            data=choose(wide, key.data, self.key.data),
            scale=choose(groups, key.scale, self.key.scale),
            offset=choose(groups, key.offset, self.key.offset),
        ),
        value=jax.tree.map(
            lambda new, old: choose(is_new, new, old), value, self.value
        ),
    )


def _without_empty(
    x: Float[Array, "B K S H"], taken: Bool[Array, "B K S"], size: int
) -> Float[Array, "B K S H"]:
  """Lets empty slots widen no range: they are as the least of their group."""
  groups = (*x.shape[:2], -1, size)
  grouped = x.reshape(*groups, x.shape[-1])
  is_taken = taken.reshape(*groups, 1)
  least = jnp.where(is_taken, grouped, jnp.inf).min(axis=3, keepdims=True)
  least = jnp.where(jnp.isfinite(least), least, 0)
  return jnp.where(is_taken, grouped, least).reshape(x.shape)


def _index(
    slot: Int[Array, "B K n"],
) -> tuple[Int[Array, "B 1 1"], Int[Array, "1 K 1"], Int[Array, "B K n"]]:
  """Of entries of axis 2, for `.at`."""
  rows, heads = map(jnp.arange, slot.shape[:2])
  return rows[:, None, None], heads[None, :, None], slot
