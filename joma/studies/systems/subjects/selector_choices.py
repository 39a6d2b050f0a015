"""What the selectors of `selection` choose, and how much of attention it keeps.

Letters: B texts, T tokens, N query heads, K key and value heads, H head size.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from joma.systems.reuse import heaviest
from joma.systems.selectors import hip
from joma.systems.selectors import landmark
from joma.systems.selectors import moba
from joma.systems.selectors import xattention
from joma.transformer import config as configs
from joma.transformer import hooks
from kernels_pallas import masks
from kernels_pallas import selection as selection_lib
from kernels_pallas.attention import reference


def systems(block: int, num: int) -> dict[str, Any]:
  """The selectors, each of which reads as many blocks of as many keys."""
  found = (
      hip.Hip(k=(num - 2) * block, block=block),
      landmark.Landmark(block=block, k=num),
      moba.Moba(k=num, block=block),
      xattention.XAttention(threshold=1.0, stride=4, block=block, k=num),
  )
  # Whose search asks one query of a few: what a fast prefill pays for.
  rare = hip.Hip(k=(num - 2) * block, block=block, stride=math.gcd(8, block))
  return {system.name: system for system in found} | {"hip, rarely": rare}


def choices(
    block: int,
    num: int,
    query: jax.Array,
    key: jax.Array,
    weights: jax.Array,
    scale: float,
) -> dict[str, selection_lib.Selection]:
  """What each selector, the oracle, chance and the newest keys choose.

  Args:
    block: Keys of a block.
    num: Blocks that a query reads.
    query: [B, T, N, H].
    key: [B, T, K, H].
    weights: Attention weights [B, N, T, T].
    scale: Of the logits.
  """
  length, num_heads = query.shape[1:3]
  mask = masks.causal(length)
  call = _call(query, scale)
  found = {
      name: system.select({}, call, query, key, mask)
      for name, system in systems(block, num).items()
  }
  mass = heaviest.block_mass(weights, key.shape[2], block)
  place = jnp.broadcast_to(
      jnp.arange(mass.shape[-1], dtype=jnp.float32), mass.shape
  )
  chance = jax.random.uniform(jax.random.key(0), mass.shape)
  own = (jnp.arange(length) // block)[None, None]
  for name, score in (("oracle", mass), ("random", chance), ("recent", place)):
    is_forced = name != "oracle"  # It bounds those that read no first block.
    chosen, is_valid = heaviest.top(score, own, num, is_forced)
    by_head = lambda x: jnp.repeat(x, num_heads // x.shape[1], axis=1)
    count = by_head(is_valid).sum(axis=-1).astype(jnp.int32)
    found[name] = selection_lib.Selection(
        by_head(chosen), count, mask, 1, block
    )
  return found


def kept(where: selection_lib.Selection, weights: jax.Array) -> jax.Array:
  """Mean weight [B] that queries of the second half read."""
  length = weights.shape[2]
  where = selection_lib.by_query_head(where, weights.shape[1])
  allowed = reference.allowed_pairs(where, length, length)
  read = jnp.where(allowed, weights, 0.0).sum(axis=-1)
  return read[:, :, length // 2 :].mean(axis=(1, 2))


def _call(query: jax.Array, scale: float) -> hooks.Call:
  shape = query.shape[:2]
  return hooks.Call(
      config=configs.TransformerConfig(),
      layer=0,
      x=jnp.zeros((*shape, 1)),
      positions=jnp.broadcast_to(jnp.arange(shape[1])[None], shape),
      rotate=lambda x, positions: x,
      options=hooks.AttentionOptions(scale=scale),
      params={},
      carry={},
      is_training=False,
      has_cache=False,
  )
