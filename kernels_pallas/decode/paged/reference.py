"""A decode step over pages in plain jnp: the contract of the paged op.

Every row is laid out as one cache, takes the step of `reference`, and is taken
apart again.
"""

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.decode import reference
from kernels_pallas.decode import rule as rule_lib
from kernels_pallas.decode import slots as slots_lib
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
  batch, num_kv_heads = key.shape[:2]
  num_rows, size = page_table.shape
  page = jax.lax.broadcasted_iota(jnp.int32, page_table.shape, 1)
  is_used = page < num_pages[:, None]
  read = jnp.where(is_used, page_table, 0)
  rows = jax.tree.map(lambda x: x[read], pool)
  slot, is_freed = paged_rule.choose(
      rows.score,
      rows.pos,
      num_pages,
      jnp.repeat(positions, num_kv_heads),
      is_by_page,
      rule,
  )
  is_emptied = is_freed[:, None] & (page == slot[:, None] // pool.capacity)
  rows = slots_lib.Slots(
      **vars(rows)
      | {
          "pos": jnp.where(
              is_emptied[..., None] | ~is_used[..., None], -1, rows.pos
          ),
          "score": jnp.where(is_emptied[..., None], 0.0, rows.score),
      }
  )
  apart = lambda x: x.reshape(batch, num_kv_heads, -1, *x.shape[3:])
  slot = slot.reshape(batch, num_kv_heads)
  out, cache = reference.step_at(
      query, key, value, jax.tree.map(apart, rows), positions, slot, rule
  )
  # Nothing is at the page after the last.
  written = jnp.where(is_used, page_table, pool.pos.shape[0])
  pages = lambda x: x.reshape(num_rows, size, pool.capacity, *x.shape[3:])
  pool = jax.tree.map(
      lambda kept, x: kept.at[written].set(pages(x), mode="drop"), pool, cache
  )
  return out, pool, slot
