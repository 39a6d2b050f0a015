"""A decode step in plain jnp: the contract of the op.

For each sequence and key head, with the new token at position p:

  1. slot   = the first empty one, else the unprotected one of least priority
  2. write  key, value, pos = p and the score of `rule.entering` there
  3. weights = softmax(soft_cap(scale query key^T)) over slots with pos >= 0
     out     = weights value
  4. score  = as `rule` says, of the weights joined over query heads

Where p = -1 the sequence is inactive: nothing is written, slot is -1, out 0.
Letters: B batch, N query heads, K key heads, G = N / K, C slots, H size of a
key's head, J of a value's.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.decode import rule as rule_lib
from kernels_pallas.decode import slots as slots_lib


def step(
    token: slots_lib.Token, cache: slots_lib.Slots, rule: rule_lib.Rule
) -> slots_lib.Stepped:
  """Computes the op."""
  slot = rule_lib.choose(cache.score, cache.pos, token.positions, rule)
  return (*step_at(token, cache, slot, rule), slot)


def step_at(
    token: slots_lib.Token,
    cache: slots_lib.Slots,
    slot: Int[Array, "B K"],
    rule: rule_lib.Rule,
) -> tuple[Float[Array, "B N J"], slots_lib.Slots]:
  """What follows the choice of the slots."""
  query, key, value, positions = token
  # A slot of -1 equals no index: an inactive sequence writes nothing.
  index = jax.lax.broadcasted_iota(jnp.int32, cache.pos.shape, 2)
  is_new = index == slot[..., None]
  cache = _written(cache, token, is_new, rule)
  dtype = jnp.promote_types(query.dtype, jnp.float32)
  kept_key = _wide(cache.key, cache.key_scale, dtype)
  kept_value = _wide(cache.value, cache.value_scale, dtype)
  batch, num_heads, head_dim = query.shape
  grouped = query.reshape(batch, key.shape[1], -1, head_dim).astype(dtype)
  logits = rule.scale * jnp.einsum(
      "BKGH,BKCH->BKGC", grouped, kept_key, precision="highest"
  )
  is_seen = rule_lib.sees(cache.pos, positions[:, None, None], rule)
  is_seen &= (positions >= 0)[:, None, None]
  logits = jnp.where(
      is_seen[:, :, None], rule_lib.capped(logits, rule), -jnp.inf
  )
  weights = jax.nn.softmax(logits, axis=-1, where=is_seen[:, :, None])
  out = jnp.einsum("BKGC,BKCH->BKGH", weights, kept_value, precision="highest")
  out = out.reshape(batch, num_heads, -1).astype(query.dtype)
  return out, rule_lib.updated(cache, weights, is_seen, positions, rule)


def _written(
    cache: slots_lib.Slots,
    token: slots_lib.Token,
    is_new: Bool[Array, "B K C"],
    rule: rule_lib.Rule,
) -> slots_lib.Slots:
  _, key, value, positions = token
  # From the key as it came, not as int8 rounds it: all implementations agree.
  score = rule_lib.entering(key, rule)[..., None]
  key_scale, value_scale = cache.key_scale, cache.value_scale
  if cache.is_quantized:
    key, new_scale = slots_lib.quantize(key)
    key_scale = jnp.where(is_new, new_scale[..., None], key_scale)
    value, new_scale = slots_lib.quantize(value)
    value_scale = jnp.where(is_new, new_scale[..., None], value_scale)
  put = lambda kept, new: jnp.where(
      is_new[..., None], new[:, :, None].astype(kept.dtype), kept
  )
  return slots_lib.Slots(
      key=put(cache.key, key),
      value=put(cache.value, value),
      score=jnp.where(is_new, score, cache.score),
      pos=jnp.where(is_new, positions[:, None, None], cache.pos),
      key_scale=key_scale,
      value_scale=value_scale,
      votes=None if cache.votes is None else jnp.where(is_new, 0, cache.votes),
  )


def _wide(rows: Array, scale: Array | None, dtype: jnp.dtype) -> Array:
  rows = rows.astype(dtype)
  return rows if scale is None else rows * scale[..., None].astype(dtype)
