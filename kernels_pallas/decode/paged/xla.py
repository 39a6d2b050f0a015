"""A decode step over pages by XLA, in place: what CPUs run.

One row at a time is gathered from the pool; new rows and scores are scattered
into it.
"""

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.decode import rule as rule_lib
from kernels_pallas.decode import slots as slots_lib
from kernels_pallas.decode import xla
from kernels_pallas.decode.paged import rule as paged_rule


def step(
    query: Any,
    key: Any,
    value: Any,
    pool: slots_lib.Slots,
    page_table: Any,
    num_pages: Any,
    positions: Any,
    is_by_page: bool,
    rule: rule_lib.Rule,
) -> tuple[Any, slots_lib.Slots, Any]:
  """Computes the op, see `paged`."""
  batch, num_kv_heads, head_dim = key.shape
  num_rows, size = page_table.shape
  (total, page_size), of_row = pool.pos.shape, jnp.arange(num_rows)
  page = jax.lax.broadcasted_iota(jnp.int32, page_table.shape, 1)
  is_used = page < num_pages[:, None]
  read = jnp.where(is_used, page_table, 0)
  by_row = jnp.repeat(positions, num_kv_heads)
  slot, is_freed = paged_rule.choose(
      pool.score[read], pool.pos[read], num_pages, by_row, is_by_page, rule
  )
  # What is at or past the end of the pool is dropped.
  own = jnp.where(slot < 0, total, read[of_row, slot // page_size])
  freed = jnp.where(is_freed, own, total)
  pos = pool.pos.at[freed].set(-1, mode="drop")
  score = pool.score.at[freed].set(0.0, mode="drop")
  pool = slots_lib.Slots(**vars(pool) | {"pos": pos, "score": score})
  rows = lambda x: x.reshape(num_rows, head_dim)
  pool = xla.write_at(
      pool, rows(key), rows(value), by_row, (own, slot % page_size), rule
  )
  is_seen = rule_lib.sees(pool.pos[read], by_row[:, None, None], rule)
  is_seen &= is_used[..., None]
  out, weights = _attend(query, pool, read, is_seen, rule)
  shape = (batch, num_kv_heads, -1)
  old = pool.score[read].reshape(shape)
  weights = weights.reshape(*shape[:2], weights.shape[1], -1)
  is_active = (positions >= 0)[:, None, None]
  new = rule_lib.rescored(old, rule_lib.joined(weights, rule), rule)
  new = jnp.where(is_active, new, old)
  written = jnp.where(is_used, page_table, total)
  score = pool.score.at[written].set(
      new.reshape(num_rows, size, page_size), mode="drop"
  )
  pool = slots_lib.Slots(**vars(pool) | {"score": score})
  out = out.reshape(query.shape)
  out = jnp.where((positions >= 0)[:, None, None], out, 0)
  return out.astype(query.dtype), pool, slot.reshape(batch, num_kv_heads)


def _attend(query, pool, read, is_seen, rule) -> Any:
  """Row by row: out [R, G, H] and weights [R, G, M S]."""
  dtype = jnp.promote_types(query.dtype, jnp.float32)
  grouped = query.reshape(read.shape[0], -1, query.shape[-1]).astype(dtype)

  def visit(arrays):
    query, pages, is_seen = arrays
    cache = jax.tree.map(lambda x: x[pages], pool)
    flat = lambda x: x.reshape(1, 1, -1, *x.shape[2:])
    cache = jax.tree.map(flat, cache)
    out, weights = xla.attend(query[None, None], cache, flat(is_seen), rule)
    return out[0, 0], weights[0, 0]

  return jax.lax.map(visit, (grouped, read, is_seen))
