"""Prompts that are read at once: their attention, and who stays.

Letters: B batch, T tokens, N query heads, K key and value heads, C slots, H
head size.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from joma.inference.cache import calls
from joma.inference.cache import policy as policy_lib
from joma.inference.cache import slot_arrays
from joma.inference.cache import tokens
from joma.transformer import full_cache
from kernels_pallas import output


def read(
    new: tokens.Tokens,
    policy: policy_lib.Policy,
    *,
    layer: int,
    capacity: int,
    is_raw: bool,
) -> tuple[output.AttentionOutput, policy_lib.Prompt]:
  """Attends within prompts; returns that, and what the policy is to read.

  Over max(C, T) keys, as a full cache of C slots would: the same bits.

  Args:
    new: The prompts.
    policy: Who is to choose among them.
    layer: Of the model.
    capacity: C.
    is_raw: Whether keys are kept before rotation.
  """
  lengths = (new.positions >= 0).sum(axis=1)
  rotated_query, rotated_key = new.rotated_query, new.rotated_key
  result = _attend(new, policy, rotated_query, rotated_key, lengths, capacity)
  col_mass, seq_len = result.col_mass, new.key.shape[1]
  if col_mass is not None:
    col_mass = col_mass[..., :seq_len]
    groups = (len(lengths), new.key.shape[2], -1)
    col_mass = col_mass.reshape(*groups, seq_len)
  prompt = policy_lib.Prompt(
      query=rotated_query,
      key=new.key if is_raw else rotated_key,
      rotated_key=rotated_key,
      value=new.value,
      raw_key=new.key,
      raw_query=new.query,
      positions=new.positions,
      lengths=lengths,
      col_mass=col_mass,
      rotate=new.rotate,
      options=new.options,
      layer=layer,
      x=new.x,
  )
  return result, prompt


def _attend(
    new: tokens.Tokens,
    policy: policy_lib.Policy,
    rotated_query: Float[Array, "B T N H"],
    rotated_key: Float[Array, "B T K H"],
    lengths: Int[Array, "B"],
    capacity: int,
) -> output.AttentionOutput:
  """Attention of prompts to all of their own tokens."""
  # As many keys as a cache of that capacity holds: sums run alike, bit by bit.
  room = max(capacity, new.key.shape[1])
  heads_first = lambda x: slot_arrays.resize(x.swapaxes(1, 2), room)
  returns: dict[str, Any] = {}
  if calls.uses_col_mass(policy):
    weights = calls.row_weights(policy, new.positions, lengths)
    weights = None if weights is None else weights[:, None]
    returns = {"return_col_mass": True, "row_weights": weights}
  return full_cache.attend_many(
      rotated_query,
      heads_first(rotated_key),
      heads_first(new.value),
      new.positions,
      new.options,
      **returns,
  )


def merged(
    policy: policy_lib.Policy,
    slots: policy_lib.Slots,
    index: Int[Array, "B K C"],
    position: Int[Array, "B"],
) -> Float[Array, "B K T H"]:
  """Values of slots, those at `index` with what the others hand on to them."""
  if not calls.merges(policy):
    return slots.value
  stays = are_among(index, slots.pos)
  leaving = slot_arrays.every_slot(slots.pos)
  return calls.merged(policy, slots, leaving, stays, position)


def are_among(
    index: Int[Array, "B K C"], pos: Int[Array, "B K T"]
) -> Bool[Array, "B K T"]:
  """Whether slots are at `index` and hold a token."""
  found = jnp.zeros(pos.shape, bool)
  found = jnp.put_along_axis(found, index, True, axis=-1, inplace=False)
  return found & (pos >= 0)


def best(
    policy: policy_lib.Policy,
    slots: policy_lib.Slots,
    position: Int[Array, "B"],
    capacity: int,
) -> Int[Array, "B K C"]:
  """Slots of the greatest rank, oldest first; ties go to the newest."""
  ranks = calls.rank(policy, slots, position)[..., ::-1]
  index = ranks.shape[-1] - 1 - jax.lax.top_k(ranks, capacity)[1]
  pos = jnp.take_along_axis(slots.pos, index, axis=-1)
  # Empty slots come last, in any order.
  order = jnp.argsort(jnp.where(pos < 0, jnp.iinfo(jnp.int32).max, pos))
  return jnp.take_along_axis(index, order, axis=-1)
