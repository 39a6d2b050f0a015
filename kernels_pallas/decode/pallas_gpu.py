"""A decode step on a Hopper GPU: one pass over keys and values.

A key head of a sequence is a row whose slots are cut into parts, so that there
are enough for all multiprocessors: the cache is only seen in another shape,
never copied. XLA chooses the slot and writes the new row in place; the kernel
(`gpu_attend`) gives out of each part, and the logits; XLA joins the parts and
turns the logits into scores. No figure of speed is known yet: the kernel is
compiled for the H100 and checked by interpretation.
"""

import dataclasses

import jax
import jax.numpy as jnp

from kernels_pallas.attention.gpu import plan as attention_plan
from kernels_pallas.decode import gpu_attend
from kernels_pallas.decode import rule as rule_lib
from kernels_pallas.decode import slots as slots_lib
from kernels_pallas.decode import xla

# Two blocks for each multiprocessor of an H100, and the fewest slots of a part.
_NUM_BLOCKS, _MIN_PART = 264, 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Sizes.

  Attributes:
    num_parts: Parts of the slots to aim for, each of whole tiles of 64; None is
      enough for every multiprocessor, of 256 slots at least.
    num_stages: Tiles that are in shared memory at once.
  """

  num_parts: int | None = None
  num_stages: int = 2

  def __post_init__(self):
    for name in ("num_parts", "num_stages"):
      number = getattr(self, name)
      if number is not None and number < 1:
        raise ValueError(f"{name}={number} must be at least 1")


def step(
    token: slots_lib.Token, cache: slots_lib.Slots, rule: rule_lib.Rule
) -> slots_lib.Stepped:
  """Computes the op, see `reference`.

  Raises:
    ValueError: If the kernel does not have the types, sizes or heads.
  """
  query, _, _, positions = token
  _check(query, cache)
  slot = rule_lib.choose(cache.score, cache.pos, positions, rule)
  cache = xla.write(cache, token, slot, rule)
  out, weights = _attend(query, cache, positions, rule)
  is_seen = rule_lib.sees(cache.pos, positions[:, None, None], rule)
  cache = rule_lib.updated(cache, weights, is_seen, positions, rule)
  return out.astype(query.dtype), cache, slot


def choose_parts(batch: int, num_kv_heads: int, capacity: int) -> int:
  """Enough parts for every multiprocessor."""
  wanted = -(-_NUM_BLOCKS // (batch * num_kv_heads))
  return max(1, min(wanted, capacity // _MIN_PART))


def _attend(
    query: jax.Array,
    cache: slots_lib.Slots,
    positions: jax.Array,
    rule: rule_lib.Rule,
) -> tuple[jax.Array, jax.Array]:
  """Out [B, N, H], and the weights [B, K, G, C]."""
  (batch, num_kv_heads, capacity), head_dim = cache.pos.shape, query.shape[-1]
  config = rule.config or Config()
  # Zeros beyond the head size change no product.
  width = next(size for size in gpu_attend.HEAD_DIMS if size >= head_dim)
  rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), cache)
  wide = lambda x: gpu_attend.padded(x, x.ndim - 1, width)
  grouped = query.reshape(batch * num_kv_heads, -1, head_dim)
  num_groups = grouped.shape[1]
  out, lse, logits = gpu_attend.attend(
      wide(grouped),
      gpu_attend.Rows(
          key=wide(rows.key),
          value=wide(rows.value),
          pos=rows.pos,
          key_scale=rows.key_scale,
          value_scale=rows.value_scale,
      ),
      jnp.repeat(positions, num_kv_heads),
      rule,
      num_parts=config.num_parts or choose_parts(*cache.pos.shape),
      num_stages=config.num_stages,
  )
  lse, out = lse[:, :, :num_groups], out[:, :, :num_groups, :head_dim]
  highest = lse.max(axis=1, keepdims=True)
  # Where a row sees nothing all is 0.
  highest = jnp.where(jnp.isneginf(highest), 0.0, highest)
  # Parts are joined as in `output.merge`: each has the share that its sum has.
  shares = jnp.exp2(lse - highest)
  total = shares.sum(axis=1, keepdims=True)
  total = jnp.where(total > 0, total, 1.0)
  out = ((shares / total)[..., None] * out.astype(jnp.float32)).sum(axis=1)
  # Logits less the log of the whole sum: final weights without a second pass.
  whole = (highest + jnp.log2(total)).swapaxes(1, 2)
  weights = jnp.exp2(logits[:, :num_groups, :capacity] - whole)
  weights = weights.reshape(batch, num_kv_heads, num_groups, capacity)
  return out.reshape(query.shape), weights


def _check(query: jax.Array, cache: slots_lib.Slots) -> None:
  """Raises ValueError for what the kernel lacks."""
  if cache.key.dtype not in (query.dtype, jnp.int8):
    raise ValueError(
        f"pallas_gpu needs a cache of the query's type, {query.dtype}, or int8,"
        f" not {cache.key.dtype}; use implementation='xla'"
    )
  num_groups = query.shape[1] // cache.pos.shape[1]
  if num_groups > gpu_attend.MOST_GROUPS:
    raise ValueError(
        f"pallas_gpu takes up to {gpu_attend.MOST_GROUPS} query heads a key"
        f" head, not {num_groups}; use implementation='xla'"
    )
  reason = attention_plan.why_not(query[:, None], any_device=True)
  if reason is not None:
    raise ValueError(reason)
