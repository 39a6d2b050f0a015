"""A decode step over pages by XLA, in place: what CPUs run.

Products go page by page, each with the queries of the row that owns it, and
the softmax of a row joins its pages as segments: a row costs what it owns,
however many pages another has. New rows and scores are scattered into the pool.

Letters as in `api`; G = N / K.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.decode import rule as rule_lib
from kernels_pallas.decode import slots as slots_lib
from kernels_pallas.decode import xla
from kernels_pallas.decode.paged import rule as paged_rule
from kernels_pallas.transformations import exported

# Pages at a time that are brought into the type of the query.
_PAGES_AT_ONCE = 64


def step(
    given: paged_rule.Given, is_by_page: bool, rule: rule_lib.Rule
) -> slots_lib.Stepped:
  """Computes the op, see `api`."""
  (query, key, value, positions), pool, pages = given
  page_table, num_pages = pages
  batch, num_kv_heads = key.shape[:2]
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
  rows = lambda x: x.reshape(num_rows, x.shape[-1])
  pool = xla.write_at(
      pool, rows(key), rows(value), by_row, (own, slot % page_size), rule
  )
  owner, owned = _pages(pool, page_table, is_used)
  # Pages of nobody belong to row R, whose token is inactive.
  position = jnp.append(by_row, -1)[owner]
  is_seen = rule_lib.sees(owned.pos, position[:, None], rule)
  is_seen &= (position >= 0)[:, None]
  grouped = query.reshape(num_rows, -1, query.shape[-1])
  out, weights = _attend(grouped, owned, owner, is_seen, rule)
  mass = rule_lib.joined(weights[:, None], rule)[:, 0]
  new = rule_lib.rescored(owned.score, mass, rule)
  score = jnp.where((position >= 0)[:, None], new, owned.score)
  if owned is not pool:
    written = jnp.where(is_used, page_table, total).reshape(-1)
    score = pool.score.at[written].set(score, mode="drop")
  pool = slots_lib.Slots(**vars(pool) | {"score": score})
  out = out.reshape(*query.shape[:2], value.shape[-1]).astype(query.dtype)
  return out, pool, slot.reshape(batch, num_kv_heads)


def _pages(
    pool: slots_lib.Slots,
    page_table: Int[Array, "R M"],
    is_used: Bool[Array, "R M"],
) -> tuple[Int[Array, "P"], slots_lib.Slots]:
  """The row that owns each page, and the pages; R is nobody, and inactive.

  They are the pool, where it lies, unless rows are a small part of it: then
  those of the table, gathered.
  """
  num_rows, total = page_table.shape[0], pool.pos.shape[0]
  rows = jax.lax.broadcasted_iota(jnp.int32, page_table.shape, 0)
  # A table that could name a part of the pool alone: gathering that is less
  # than a product with all of it.
  if exported.known(page_table.size, total) < total:
    owner = jnp.where(is_used, rows, num_rows).reshape(-1)
    read = jnp.where(is_used, page_table, 0).reshape(-1)
    return owner, jax.tree.map(lambda x: x[read], pool)
  owner = jnp.full(total, num_rows, jnp.int32)
  place = jnp.where(is_used, page_table, total)
  return owner.at[place].set(rows, mode="drop"), pool


def _attend(
    query: Float[Array, "R G H"],
    pool: slots_lib.Slots,
    owner: Int[Array, "P"],
    is_seen: Bool[Array, "P S"],
    rule: rule_lib.Rule,
) -> tuple[Float[Array, "R G J"], Float[Array, "P G S"]]:
  """Out of each row and weights of each page; 0 where nothing is seen."""
  dtype = jnp.promote_types(query.dtype, jnp.float32)
  num_rows = query.shape[0]
  # A row of zeros for the pages of nobody.
  of_page = jnp.pad(query.astype(dtype), ((0, 1), (0, 0), (0, 0)))[owner]
  of_row = lambda x, joined: joined(x, owner, num_rows + 1)
  products = _by_page(
      "PGH,PSH->PGS", dtype, of_page, pool.key, pool.key_scale, True
  )
  logits = rule_lib.capped(rule.scale * products, rule)
  lowest = jnp.finfo(dtype).min
  logits = jnp.where(is_seen[:, None], logits, lowest)
  highest = of_row(logits.max(axis=-1), jax.ops.segment_max)
  # Rows without a page have -inf, whose differences would be NaN.
  highest = jnp.maximum(highest, lowest)
  # One softmax a row over all of its pages, wherever they lie.
  weights = jnp.exp(logits - highest[owner][..., None])
  weights = jnp.where(is_seen[:, None], weights, 0)
  total = of_row(weights.sum(axis=-1), jax.ops.segment_sum)
  weights /= jnp.where(total > 0, total, 1)[owner][..., None]
  out = _by_page(
      "PGS,PSH->PGH", dtype, weights, pool.value, pool.value_scale, False
  )
  return of_row(out, jax.ops.segment_sum)[:num_rows], weights


def _by_page(
    equation: str,
    dtype: jnp.dtype,
    left: Float[Array, "P G _"],
    stored: Array,
    scale: Float[Array, "P S"] | None,
    is_logit: bool,
) -> Float[Array, "P G _"]:
  """Products of pages [P, S, H]; scales are factors of slots, never of rows."""
  if scale is not None and not is_logit:
    left = left * scale[:, None]
  if stored.dtype == dtype:
    products = jnp.einsum(equation, left, stored, precision="highest")
  else:
    # A few at a time: a whole pool in a wider type would be a copy of it.
    visit = lambda pair: jnp.einsum(
        equation.replace("P", ""),
        pair[0],
        pair[1].astype(dtype),
        precision="highest",
    )
    products = jax.lax.map(visit, (left, stored), batch_size=_PAGES_AT_ONCE)
  if scale is not None and is_logit:
    products = products * scale[:, None]
  return products
