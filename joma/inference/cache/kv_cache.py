"""A KV cache of a fixed number of slots, which a policy shares out.

Shapes never change: one compilation serves every length, and a donated cache is
written in place, one slot a step. What leaves and what stays is the policy's
(`policy`, `policies`); each key head of each sequence decides for itself. With
as many slots as tokens every policy equals the full cache, bit for bit.

Letters: B batch, T new tokens, C slots, N query heads, K key and value heads,
G = N / K, H head size.
"""

import dataclasses
import functools
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from joma.inference.cache import cache_options
from joma.inference.cache import calls
from joma.inference.cache import policy as policy_lib
from joma.inference.cache import prompts
from joma.inference.cache import rules
from joma.inference.cache import slot_arrays
from joma.inference.cache import slot_step
from joma.inference.cache import storage
from joma.inference.cache import tokens
from joma.inference.cache import trial
from joma.systems.cache_policies import names as policy_names
from joma.transformer import config as configs
from joma.transformer import hooks
from joma.transformer import layer_hooks
from joma.transformer import one_by_one
from scansnap_jax.experiment import require


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotCache(slot_arrays.SlotArrays):
  """Slots of one layer; a `hooks.KVCache`."""

  honours: ClassVar[tuple[str, ...]] = ("sinks", "keys")

  def num_positions(self) -> int | None:
    """Its slots, where nothing leaves them."""
    return None if self.policy.evicts else self.capacity

  def kept_positions(self) -> Int[Array, "B K C"]:
    """Positions that each head keeps, -1 in empty slots."""
    return self.pos

  def reads_call(self) -> bool:
    """Whether the policy looks at the layer's input."""
    return calls.uses_input(self.policy)

  def on_trial(self) -> trial.SlotTrial:
    """Notes what tokens change, so that they can be taken back."""
    return trial.SlotTrial(self)

  def attend(
      self,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      positions: Int[Array, "B T"],
      rotate: hooks.Rotate,
      options: hooks.AttentionOptions,
  ) -> tuple[Float[Array, "B T N H"], "SlotCache"]:
    """One token: a decode step. More: prompts.

    First prompts attend to all of their own tokens; then the policy chooses
    those that stay. Prompts to a cache that holds something are as their tokens
    one by one.
    """
    new = tokens.Tokens(query, key, value, positions, rotate, options)
    if query.shape[1] > 1:
      return one_by_one.unless_new(
          (self.pos < 0).all(),
          lambda: read(self, new),
          SlotCache.attend,
          self,
          *new.arguments,
      )
    if slot_step.is_fused(self, options):
      return slot_step.decode_fused(self, new)
    return slot_step.decode(self, new)


def init(
    policy: policy_lib.Policy,
    config: configs.TransformerConfig,
    batch_size: int,
    capacity: int,
    dtype: jax.typing.DTypeLike = jnp.float32,
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
    UserError: If the sizes do not fit together, if rolled positions are asked
      of a model without rotary ones, or if a layer's systems leave the policy
      nothing to evict from.
  """
  require.at_least("batch_size", batch_size, 1)
  options = cache_options.resolve(config, keys, positions, page_size)
  sizes = calls.capacities(policy, config.num_layers, capacity)
  return tuple(
      _init_one(policy, config, layer, batch_size, size, dtype, options)
      for layer, size in enumerate(sizes)
  )


def _init_one(
    policy: policy_lib.Policy,
    config: configs.TransformerConfig,
    layer: int,
    batch_size: int,
    size: int,
    dtype: jax.typing.DTypeLike,
    options: cache_options.CacheOptions,
) -> hooks.KVCache | layer_hooks.PreparedCache:
  """Returns a layer's cache: its systems', the policy's own kind, or slots."""
  cache_options.check_capacity(size, config, options)
  sized = policy.with_capacity(size)

  def make() -> hooks.KVCache:
    own = calls.init_cache(
        sized, config, layer, batch_size, size, dtype, options
    )
    if own is not None:
      return own
    shape = (batch_size, config.num_kv_heads, size, config.head_dim)
    num_groups = config.num_heads // config.num_kv_heads
    return init_layer(sized, layer, shape, num_groups, dtype, options)

  name = policy_names.name_of(policy) if policy.evicts else None
  return layer_hooks.init_cache(
      config, layer, batch_size, size, dtype, make, policy=name
  )


def init_layer(
    policy: policy_lib.Policy,
    layer: int,
    shape: tuple[int, int, int, int],
    num_groups: int,
    dtype: jax.typing.DTypeLike,
    options: cache_options.CacheOptions = cache_options.DEFAULT,
) -> SlotCache:
  """Returns the empty cache of one layer, of shape [B, K, C, H].

  One program makes those of all layers.
  """
  cache = _empty(policy, shape, num_groups, dtype, options)
  return dataclasses.replace(cache, layer=layer)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _empty(
    policy: policy_lib.Policy,
    shape: tuple[int, int, int, int],
    num_groups: int,
    dtype: jax.typing.DTypeLike,
    options: cache_options.CacheOptions,
) -> SlotCache:
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
      aux=calls.init_aux(policy, batch, num_kv_heads, capacity, num_groups),
      state=calls.init_state(policy, batch, num_kv_heads, head_dim, num_groups),
      policy=policy,
      options=options,
      layer=0,
      num_groups=num_groups,
  )


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
      policy, slot_step.view(cache), position, min(capacity, cache.capacity)
  )
  if capacity < cache.capacity:
    cache = slot_step.handed_on(
        cache,
        slot_arrays.every_slot(cache.pos),
        prompts.are_among(index, cache.pos),
        position,
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
    a query) that went to tokens still kept, where the policy's score is a sum
    of it.
  """
  is_kept = cache.pos >= 0
  count = is_kept.sum(axis=-1)
  age = jnp.where(is_kept, position[:, None, None] - cache.pos, 0)
  found = {
      "occupancy": count / cache.capacity,
      "mean_age": age.sum(axis=-1) / jnp.maximum(count, 1),
      "max_age": age.max(axis=-1).astype(jnp.float32),
  }
  mass = calls.kept_mass(cache.policy, slot_step.view(cache), position)
  return found if mass is None else {**found, "kept_mass": mass}


def read(
    cache: SlotCache, new: tokens.Tokens
) -> tuple[Float[Array, "B T N H"], SlotCache]:
  """Attends within first prompts; returns that, and what stays of them.

  Args:
    cache: Empty, of one layer.
    new: The prompts.
  """
  policy, capacity = cache.policy, cache.capacity
  result, prompt = prompts.read(
      new,
      policy,
      layer=cache.layer,
      capacity=capacity,
      is_raw=cache.options.keys == "raw",
  )
  out = result.out
  cache = keep(cache, prompt, calls.read_prompt(policy, prompt))
  if not policy.evicts:
    overflows = prompt.lengths > capacity
    out = jnp.where(overflows[:, None, None, None], jnp.nan, out)
  return out, cache


def keep(
    cache: SlotCache, prompt: policy_lib.Prompt, prompted: rules.Prompted
) -> SlotCache:
  """Chooses among the tokens of a prompt.

  Args:
    cache: Empty, of one layer.
    prompt: Of which those with a position may stay.
    prompted: What the policy says of them.
  """
  score, aux, state = prompted
  key, value = prompt.key.swapaxes(1, 2), prompt.value.swapaxes(1, 2)
  pos = jnp.broadcast_to(prompt.positions[:, None], key.shape[:3])
  seq_len, capacity = pos.shape[2], cache.capacity
  kept = (key, value, score, aux)
  if seq_len > capacity:
    slots = policy_lib.Slots(
        key, value, score, pos, aux, state, cache.layer, cache.num_groups
    )
    index = prompts.best(cache.policy, slots, prompt.lengths, capacity)
    value = prompts.merged(cache.policy, slots, index, prompt.lengths)
    kept = (key, value, score, aux)
    kept, pos = jax.tree.map(lambda x: slot_arrays.take(x, index), (kept, pos))
  fit = lambda x: slot_arrays.resize(x, capacity)
  key, value, score, aux = jax.tree.map(fit, kept)
  pos = slot_arrays.resize(pos, capacity, -1).astype(jnp.int32)
  cache = dataclasses.replace(
      cache,
      key=storage.write(cache.key, key),
      value=storage.write(cache.value, value),
      score=score,
      pos=pos,
      rank=None if cache.rank is None else slot_arrays.ranks_of(pos),
      aux=aux,
      state=state,
  )
  return slot_step.without_freed(cache, prompt.lengths)
