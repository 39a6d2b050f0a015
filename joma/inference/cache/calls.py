"""What a policy is asked: its own rule, or what stands where it has none.

By default a score is 0 and stays so, the score is the priority, and every layer
has the same number of slots.

Letters: B batch, T tokens of a prompt, K key and value heads, C slots, L
layers.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from joma.inference.cache import cache_options
from joma.inference.cache import policy as policy_lib
from joma.inference.cache import rules
from joma.inference.cost import cache_plan
from joma.transformer import config as configs
from joma.transformer import hooks

Policy = policy_lib.Policy


def uses_col_mass(policy: Policy) -> bool:
  """Whether it wants `Prompt.col_mass`, itself or by what it wraps."""
  if isinstance(policy, rules.Wraps):
    return any(map(uses_col_mass, policy.wrapped()))
  return policy.uses_col_mass


def uses_queries(policy: Policy) -> bool:
  """Whether it looks at queries of a prompt, itself or by what it wraps."""
  if isinstance(policy, rules.Wraps):
    return any(map(uses_queries, policy.wrapped()))
  return policy.uses_queries


def uses_input(policy: Policy) -> bool:
  """Whether it looks at the layer's input, itself or by what it wraps."""
  if isinstance(policy, rules.Wraps):
    return any(map(uses_input, policy.wrapped()))
  return policy.uses_input


def read_prompt(policy: Policy, prompt: policy_lib.Prompt) -> rules.Prompted:
  """Returns score, aux and state after a prompt, or after a rehearsal."""
  if prompt.starts is not None and isinstance(policy, rules.Rehearses):
    return policy.read_rehearsal(prompt, prompt.starts)
  if isinstance(policy, rules.ReadsPrompts):
    return policy.read_prompt(prompt)
  batch, seq_len, num_kv_heads = prompt.key.shape[:3]
  return jnp.zeros((batch, num_kv_heads, seq_len)), None, None


def request(policy: Policy) -> str | None:
  """What asks for a text a second time; None where it is read once.

  A policy that wraps others asks for it if all of them do.
  """
  if isinstance(policy, rules.Rehearses):
    return policy.request
  if not isinstance(policy, rules.Wraps):
    return None
  first, *others = map(request, policy.wrapped())
  return first if None not in others else None


def row_weights(
    policy: Policy, positions: Int[Array, "B T"], lengths: Int[Array, "B"]
) -> Float[Array, "B T"] | None:
  """Weight of each query of a prompt in its column mass; None is 1."""
  if not isinstance(policy, rules.WeighsRows):
    return None
  return policy.row_weights(positions, lengths)


def enter(
    policy: Policy, token: policy_lib.Token, state: policy_lib.Arrays
) -> rules.Entered:
  """Returns score and aux of a new token, and the new state."""
  if isinstance(policy, rules.MarksTokens):
    return policy.enter(token, state)
  return jnp.zeros(token.key.shape[:2]), None, state


def rank(
    policy: Policy, slots: policy_lib.Slots, position: Int[Array, "B"]
) -> Float[Array, "B K C"]:
  """Priority, with -inf for empty slots and inf for protected ones."""
  ranks = priority(policy, slots, position).astype(jnp.float32)
  protected = policy.is_protected(slots.pos, position)
  return jnp.where(
      slots.pos < 0, -jnp.inf, jnp.where(protected, jnp.inf, ranks)
  )


def priority(
    policy: Policy, slots: policy_lib.Slots, position: Int[Array, "B"]
) -> Array:
  """What a slot is worth to the token at `position`; the least leaves."""
  if not isinstance(policy, rules.Prioritises):
    return slots.score
  return policy.priority(slots, position)


def observe(
    policy: Policy, slots: policy_lib.Slots, step: policy_lib.Step
) -> rules.Observed:
  """Returns score, aux and state after a step."""
  if isinstance(policy, rules.Observes):
    return policy.observe(slots, step)
  return slots.score, slots.aux, slots.state


def still_kept(
    policy: Policy, slots: policy_lib.Slots, position: Int[Array, "B"]
) -> Int[Array, "B K C"]:
  """Positions of slots for the token at `position`; -1 where one is freed."""
  if not isinstance(policy, rules.Frees):
    return slots.pos
  freed = policy.freed(slots, position)
  freed = freed & ~policy.is_protected(slots.pos, position)
  return jnp.where(freed, -1, slots.pos)


def has_own_cache(policy: Policy) -> bool:
  """Whether it keeps tokens in a cache of another kind than slots."""
  return isinstance(policy, rules.HasOwnCache)


def merges(policy: Policy) -> bool:
  """Whether tokens that leave change the values of others."""
  return isinstance(policy, rules.Merges)


def merged(
    policy: Policy,
    slots: policy_lib.Slots,
    leaving: Int[Array, "B K L"],
    stays: Bool[Array, "B K C"],
    position: Int[Array, "B"],
) -> Float[Array, "B K C H"]:
  """Values of slots after those that leave have handed theirs on.

  Args:
    policy: Who may say so.
    slots: Before anything has left.
    leaving: Slots among which are all those that leave.
    stays: Whether a slot holds a token that stays.
    position: Of the token for which the others leave.
  """
  if not isinstance(policy, rules.Merges):
    return slots.value
  return policy.merged(slots, leaving, stays, position)


def init_cache(
    policy: Policy,
    config: configs.TransformerConfig,
    layer: int,
    batch_size: int,
    capacity: int,
    dtype: jax.typing.DTypeLike,
    options: cache_options.CacheOptions,
) -> hooks.KVCache | None:
  """Returns a cache of another kind than slots; None is slots."""
  if not isinstance(policy, rules.HasOwnCache):
    return None
  return policy.init_cache(config, layer, batch_size, capacity, dtype, options)


def init_aux(
    policy: Policy,
    batch: int,
    num_kv_heads: int,
    capacity: int,
    num_groups: int,
) -> policy_lib.Arrays:
  """Returns the policy's arrays of slots, [B, K, C, ...] each."""
  if not isinstance(policy, rules.HasAux):
    return None
  return policy.init_aux(batch, num_kv_heads, capacity, num_groups)


def init_state(
    policy: Policy,
    batch: int,
    num_kv_heads: int,
    head_dim: int,
    num_groups: int,
) -> policy_lib.Arrays:
  """Returns the policy's arrays of sequences, [B, ...] each."""
  if not isinstance(policy, rules.HasState):
    return None
  return policy.init_state(batch, num_kv_heads, head_dim, num_groups)


def kernel_options(policy: Policy) -> dict[str, Any] | None:
  """Options with which a decode kernel is this policy; None if none is."""
  return (
      None
      if not isinstance(policy, rules.HasKernel)
      else policy.kernel_options()
  )


def kept_mass(
    policy: Policy, slots: policy_lib.Slots, position: Int[Array, "B"]
) -> Float[Array, "B K"] | None:
  """Share of all attention so far that went to what is kept, if known."""
  if isinstance(policy, rules.KnowsMass):
    return policy.kept_mass(slots, position)
  return None


def capacities(
    policy: Policy, num_layers: int, capacity: int
) -> tuple[int, ...]:
  """Slots of each layer; their mean is `capacity`."""
  if isinstance(policy, rules.SharesLayers):
    return policy.capacities(num_layers, capacity)
  if isinstance(policy, rules.Wraps):
    return capacities(policy.wrapped()[-1], num_layers, capacity)
  return (capacity,) * num_layers


def fitted(
    policy: Policy, slots: int, named: frozenset[str] = frozenset()
) -> Policy:
  """Returns the policy with sizes that so few slots of a KV head allow.

  Args:
    policy: As somebody has asked for it.
    slots: What is granted to a KV head.
    named: Fields that somebody has set, which stay as they are.
  """
  return (
      policy.fitted(slots, named) if isinstance(policy, rules.Fits) else policy
  )


def plan(
    policy: Policy, slots: tuple[int, ...], name: str
) -> cache_plan.CachePlan:
  """Returns what its cache costs; by default each step changes every score.

  Args:
    policy: With its sizes.
    slots: Of each layer.
    name: In tables.
  """
  if isinstance(policy, rules.Plans):
    return policy.plan(slots, name)
  return cache_plan.scored(slots, name)


def costed(
    policy: Policy, room: cache_plan.Room, name: str
) -> cache_plan.CachePlan:
  """Returns what it costs to keep a share of a text.

  Args:
    policy: As a name gives it, its sizes not set yet.
    room: What it may keep, of what model and text.
    name: In tables.
  """
  if isinstance(policy, rules.IsCosted):
    return policy.costed(room, name)
  own = {field.name for field in dataclasses.fields(policy)}
  settings: dict[str, Any] = {
      key: value for key, value in room.settings.items() if key in own
  }
  sized = dataclasses.replace(policy, **settings)
  sized = fitted(sized, room.capacity, frozenset(settings))
  slots = capacities(sized, room.model.num_layers, room.capacity)
  return plan(sized, tuple(min(n, room.length) for n in slots), name)
