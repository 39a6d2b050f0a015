"""A decode step over pages in plain jnp: the contract of the paged op.

Every row is laid out as one cache, takes the step of `reference`, and is taken
apart again.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.decode import reference
from kernels_pallas.decode import rule as rule_lib
from kernels_pallas.decode import slots as slots_lib
from kernels_pallas.decode.paged import rule as paged_rule


def step(
    given: paged_rule.Given, is_by_page: bool, rule: rule_lib.Rule
) -> slots_lib.Stepped:
  """Computes the op, see `api`."""
  token, pool, (page_table, num_pages) = given
  batch, num_kv_heads = token.key.shape[:2]
  num_rows, size = page_table.shape
  page = jax.lax.broadcasted_iota(jnp.int32, page_table.shape, 1)
  is_used = page < num_pages[:, None]
  read = jnp.where(is_used, page_table, 0)
  rows = jax.tree.map(lambda x: x[read], pool)
  slot, is_freed = paged_rule.choose(
      rows.score,
      rows.pos,
      num_pages,
      jnp.repeat(token.positions, num_kv_heads),
      is_by_page,
      rule,
  )
  is_emptied = is_freed[:, None] & (page == slot[:, None] // pool.capacity)
  # A freed page is emptied before the step, and pages that a row does not own
  # look empty to it.
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
  out, cache = reference.step_at(token, jax.tree.map(apart, rows), slot, rule)
  # Nothing is at the page after the last.
  written = jnp.where(is_used, page_table, pool.pos.shape[0])
  by_page = lambda x: x.reshape(num_rows, size, pool.capacity, *x.shape[3:])
  pool = jax.tree.map(
      lambda kept, x: kept.at[written].set(by_page(x), mode="drop"), pool, cache
  )
  return out, pool, slot
