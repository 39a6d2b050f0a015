"""The same decode step over pages of a pool that many caches share.

A row is a key head of a sequence, r = b K + k: rows may have different numbers
of pages, that is, different budgets. Letters: B batch, N query heads, K key and
value heads, R = B K rows, P pages of the pool, M pages of a row at most, S
slots of a page, H size of a query's and a key's head, J of a value's.
PagedAttention (https://arxiv.org/abs/2309.06180).
"""

from collections.abc import Mapping
import importlib
import typing
from typing import Any, Literal

from jax.experimental import checkify
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas import arguments
from kernels_pallas import implementations
from kernels_pallas import masks
from kernels_pallas.decode import api
from kernels_pallas.decode import rule as rule_lib
from kernels_pallas.decode import slots as slots_lib
from kernels_pallas.decode.paged import rule as paged_rule
from kernels_pallas.transformations import derivatives
from kernels_pallas.transformations import exported
from kernels_pallas.transformations import manual_axes

Granularity = Literal["token", "page"]
# What a row can do without the others, and with a score a slot alone.
Score = Literal["sum", "mean", "ema", "position"]
Reduce = Literal["sum", "max", "mean"]
# Rows of 16 bits that a TPU moves together. Its kernel takes int8 from 32 on.
MIN_PAGE_SIZE = 16


def can_hold(options: Mapping[str, Any]) -> bool:
  """Whether options of `api.decode_step` are a rule that rows can have."""
  return options.get("score", "sum") in typing.get_args(Score) and options.get(
      "reduce", "sum"
  ) in typing.get_args(Reduce)


def decode_step(
    query: Float[Array, "B N H"],
    key: Float[Array, "B K H"],
    value: Float[Array, "B K J"],
    pool: slots_lib.Slots,
    page_table: Int[Array, "R M"],
    num_pages: Int[Array, "R"],
    positions: Int[Array, "B"],
    *,
    granularity: Granularity = "token",
    num_sinks: int = 0,
    num_recent: int = 0,
    score: Score = "sum",
    decay: float = 1.0,
    gain: float = 1.0,
    reduce: Reduce = "sum",
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    window: int | None = None,
    implementation: implementations.Implementation | None = None,
) -> tuple[Float[Array, "B N J"], slots_lib.Slots, Int[Array, "B K"]]:
  """Writes, attends and scores as `api.decode_step` does.

  Slot s of a row is slot s % S of page `page_table[r, s // S]`. Donate the
  pool, and it is updated in place.

  Args:
    query: As there, and so are all that are not named here.
    key: K divides N.
    value: As key.
    pool: key [P, S, H] and value [P, S, J], score and pos [P, S], scales
      [P, S]. S is 16 or more; on a TPU also a divisor or a multiple of 128.
      Programs for some TPUs turn arrays of rows of less than 128 around when
      they start, unless `jax.jit` is told a `Layout` by rows for the pool, in
      and out.
    page_table: Pages of each row in order, of no two rows the same; what is at
      or past `num_pages` is not read.
    num_pages: Pages of each row, at least 1, with room for a token that is not
      protected.
    positions: Of the new tokens; -1 is inactive.
    granularity: "token" evicts a token. "page" frees, where no slot of the row
      is empty, the page of least summed priority among those without a
      protected token, and takes its first slot; if every page has one, a token
      goes.
    num_sinks: Positions below it are never evicted.
    num_recent: Nor so many positions before the new token's.
    score: What priority is.
    decay: What a step leaves of the scores.
    gain: Factor of what it adds to them.
    reduce: How query heads join.
    scale: Factor of the logits.
    logits_soft_cap: c in c tanh(logits / c).
    window: Positions that the query sees.
    implementation: None is the best of the platform; a named one raises where
      it cannot run. There is none for GPUs.

  Returns:
    (out, pool, slot): slot is which of its row each token took, or -1.

  Raises:
    ValueError: As there. Entries of the table that are out of range are found
      under `jax.experimental.checkify`.
  """
  positions, page_table, num_pages = map(
      arguments.narrow, (positions, page_table, num_pages)
  )
  api.check_vectors(query, key, value, positions)
  _check_pool(pool, key, value, page_table, num_pages)
  api.check_choice("granularity", granularity, Granularity)
  api.check_choice("score", score, Score)
  api.check_choice("reduce", reduce, Reduce)
  rule = api.make_rule(
      query,
      num_sinks=num_sinks,
      num_recent=num_recent,
      score=score,
      decay=decay,
      gain=gain,
      reduce=reduce,
      history=32,
      scale=scale,
      logits_soft_cap=logits_soft_cap,
      window=window,
      config=None,
  )
  # Of the largest row; what each row has is known when the program runs.
  api.check_room(rule, page_table.shape[1] * pool.capacity, "slots of a row")
  if implementation == "pallas_gpu":
    raise ValueError(
        "implementation='pallas_gpu' is not there for pages; use 'xla',"
        " 'reference' or None"
    )
  head_sizes = query.shape[-1], value.shape[-1]
  choose = lambda named=None: api.choose_for(named, *head_sizes)
  axes = ("BNH", query), ("RM", page_table)
  chosen, query = exported.chosen("decode_step", implementation, choose, *axes)
  _check_values(pool, page_table, num_pages, rule)
  module = importlib.import_module(f"{__package__}.{chosen}")
  given = paged_rule.Given(
      slots_lib.Token(query, key, value, positions),
      pool,
      paged_rule.PageTable(page_table, num_pages),
  )
  step = lambda given: module.step(given, granularity == "page", rule)
  return derivatives.run("decode_step", module, step, manual_axes.align(given))


def _check_pool(
    pool: object,
    key: masks.AnyArray,
    value: masks.AnyArray,
    page_table: masks.AnyArray,
    num_pages: masks.AnyArray,
) -> None:
  """Raises ValueError unless pool and tables fit key [B, K, H]."""
  num_rows = key.shape[0] * key.shape[1]
  if not isinstance(pool, slots_lib.Slots) or pool.pos.ndim != 2:
    raise ValueError(
        "pool must be a kernels_pallas.decode.slots.Slots with"
        " pos [pages, page_size], and the rest alike"
    )
  if pool.capacity < MIN_PAGE_SIZE:
    raise ValueError(
        f"the pool has pages of {pool.capacity} slots; page_size must be at"
        f" least {MIN_PAGE_SIZE}"
    )
  api.check_int32("pool.pos", pool.pos, pool.pos.shape)
  api.check_stored(pool, pool.pos.shape, key.shape[-1], value.shape[-1])
  if page_table.ndim != 2 or 0 in page_table.shape:
    raise ValueError(
        f"page_table has shape {page_table.shape}; it must be"
        f" [{num_rows}, pages of a row]"
    )
  api.check_int32("page_table", page_table, (num_rows, page_table.shape[1]))
  api.check_int32("num_pages", num_pages, (num_rows,))


def _check_values(
    pool: slots_lib.Slots,
    page_table: masks.AnyArray,
    num_pages: masks.AnyArray,
    rule: rule_lib.Rule,
) -> None:
  """Checks what is only known when the program runs, under checkify alone."""
  size, (total, page_size) = page_table.shape[1], pool.pos.shape
  checkify.debug_check(
      jnp.all((num_pages >= 1) & (num_pages <= size)),
      "num_pages must be from 1 to {size}, the pages that a row of page_table"
      " has; found {least} to {most}",
      size=jnp.int32(size),
      least=num_pages.min(),
      most=num_pages.max(),
  )
  is_used = jnp.arange(size)[None] < num_pages[:, None]
  used = jnp.where(is_used, page_table, 0)
  checkify.debug_check(
      jnp.all((used >= 0) & (used < total)),
      "page_table has pages from {least} to {most}; the pool has 0 to {last}",
      least=used.min(),
      most=used.max(),
      last=jnp.int32(total - 1),
  )
  room = num_pages.min() * page_size - 1
  checkify.debug_check(
      rule.num_sinks + rule.num_recent <= room,
      "a row protects {protected} tokens, but of its slots at most {room} may"
      " be protected",
      protected=jnp.int32(rule.num_sinks + rule.num_recent),
      room=room,
  )
