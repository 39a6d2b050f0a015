"""A decode step on a Hopper GPU, by the attention kernels of this package.

A key head of a sequence is a batch entry whose queries are the heads that share
it, and its slots are cut into parts, so that there are enough entries for all
multiprocessors: the cache is only seen in other shapes, never copied. Out and
lse of the parts are merged; the scores come from the kernel of column sums,
which reads the keys a second time. XLA chooses the slot and writes the new row
in place. No figure of speed is known yet.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas import differentiable
from kernels_pallas import masks
from kernels_pallas.heavy_hitter_decode import rule as rule_lib
from kernels_pallas.heavy_hitter_decode import slots as slots_lib
from kernels_pallas.heavy_hitter_decode import xla
from kernels_pallas.tiles import gpu_attention

# Multiprocessors of an H100, and the fewest slots of a part: two tiles.
_NUM_CORES, _MIN_PART = 132, 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Sizes.

  Attributes:
    num_parts: Parts of the slots, a divisor of the capacity; None is enough for
      every multiprocessor, of 256 slots at least.
    tiles: Of the kernels.
  """

  num_parts: int | None = None
  tiles: gpu_attention.Config = gpu_attention.Config()

  def __post_init__(self):
    if self.num_parts is not None and self.num_parts < 1:
      raise ValueError(f"num_parts={self.num_parts} must be at least 1")


def step(
    query: Float[Array, "B N H"],
    key: Float[Array, "B K H"],
    value: Float[Array, "B K H"],
    cache: slots_lib.Slots,
    positions: Int[Array, "B"],
    rule: rule_lib.Rule,
) -> tuple[Float[Array, "B N H"], slots_lib.Slots, Int[Array, "B K"]]:
  """Computes the op, see `reference`.

  Raises:
    ValueError: If the kernels do not have the type, head size or reduction.
  """
  _check(query, cache, rule)
  config = rule.config or Config()
  num_parts = config.num_parts or choose_parts(*cache.pos.shape)
  if cache.capacity % num_parts:
    raise ValueError(
        f"num_parts={num_parts} must divide the {cache.capacity} slots"
    )
  slot = rule_lib.choose(cache.score, cache.pos, positions, rule)
  cache = xla.write(cache, key, value, positions, slot)
  is_seen = rule_lib.sees(cache.pos, positions[:, None, None], rule)
  is_seen &= (positions >= 0)[:, None, None]
  out, mass = _attend(query, cache, is_seen, num_parts, config, rule)
  score = rule_lib.updated(cache.score, mass[:, :, None], positions, rule)
  cache = dataclasses.replace(cache, score=score)
  return out.astype(query.dtype), cache, slot


def choose_parts(batch: int, num_kv_heads: int, capacity: int) -> int:
  """Enough parts for every multiprocessor."""
  num_parts = 1
  while (
      batch * num_kv_heads * num_parts < _NUM_CORES
      and capacity % (2 * num_parts) == 0
      and capacity // (2 * num_parts) >= _MIN_PART
  ):
    num_parts *= 2
  return num_parts


def _attend(query, cache, is_seen, num_parts, config, rule) -> Any:
  """Out [B, N, H], and the sum of the weights [B, K, C]."""
  num_kv_heads, head_dim = cache.key.shape[1], query.shape[-1]
  part = cache.capacity // num_parts
  parts = lambda x: x.reshape(-1, part, 1, head_dim)
  grouped = query.reshape(-1, 1, query.shape[1] // num_kv_heads, head_dim)
  num_rows, _, num_groups, _ = grouped.shape
  queries = jnp.broadcast_to(
      grouped, (num_rows, num_parts, num_groups, head_dim)
  ).reshape(-1, num_groups, 1, head_dim)
  where = masks.Mask(
      jnp.zeros((1, num_groups), jnp.int32),
      jnp.full((1, num_groups), part, jnp.int32),
      jnp.ones((num_rows * num_parts, num_groups), jnp.int32),
      is_seen.reshape(-1, part).astype(jnp.int32),
  )
  spec = differentiable.AttentionSpec(
      scale=rule.scale, logits_soft_cap=rule.logits_soft_cap
  )
  keys, values = parts(cache.key), parts(cache.value)
  out, lse = gpu_attention.forward(
      queries, keys, values, where, None, spec, config.tiles
  )
  by_part = lse.reshape(num_rows, num_parts, num_groups)
  # Of the whole; a part without a key has share 0.
  whole = jax.nn.logsumexp(by_part, axis=1, keepdims=True)
  whole = jnp.where(jnp.isneginf(whole), 0.0, whole)
  shares = jnp.exp(by_part - whole)
  out = out.reshape(num_rows, num_parts, num_groups, head_dim)
  out = (shares[..., None] * out.astype(jnp.float32)).sum(axis=1)
  mass = gpu_attention.col_mass(
      queries,
      keys,
      lse,
      where,
      shares.reshape(-1, 1, num_groups),
      spec,
      config.tiles,
  )
  return out.reshape(query.shape), mass.reshape(cache.pos.shape)


def _check(query: Any, cache: Any, rule: rule_lib.Rule) -> None:
  """Raises ValueError for what the kernels lack."""
  if cache.key.dtype != query.dtype:
    raise ValueError(
        f"pallas_gpu needs a cache of the query's type, {query.dtype}, not"
        f" {cache.key.dtype}; use implementation='xla'"
    )
  if rule.reduce != "sum":
    raise ValueError(
        f"pallas_gpu has reduce='sum' alone, not {rule.reduce!r}; use"
        " implementation='xla'"
    )
  reason = gpu_attention.why_not(query[:, None], any_device=True)
  if reason is not None:
    raise ValueError(reason)
