"""A decode step over pages on a TPU, in one pass, the pool where it is.

A step of the grid is a sequence; its key heads, which have pages of their own,
follow each other:

  1. Scores and positions of all its pages come to VMEM, a page a sublane, and
     the slot of each head is chosen. The softmax starts from the new token.
  2. Blocks of pages of keys and values come two at a time, as the page table
     says, one ahead of its use and across heads. Logits join the softmax and
     are kept; the rows around the slot go back from the block that has them,
     the new one among them.
  3. After a head's last block its logits become weights, which are summed over
     the query heads that share it; scores go back page by page.

Pages past `num_pages` cost nothing. Letters as in `decode`.
"""

import functools
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from kernels_pallas import interpret
from kernels_pallas.decode import rule as rule_lib
from kernels_pallas.decode import slots as slots_lib
from kernels_pallas.decode import tpu_config
from kernels_pallas.decode import tpu_step
from kernels_pallas.decode.paged import rule as paged_rule
from kernels_pallas.decode.paged import tpu_choice
from kernels_pallas.decode.paged import tpu_config as paged_tpu_config
from kernels_pallas.decode.paged import tpu_copies
from kernels_pallas.decode.paged import tpu_lanes
from kernels_pallas.decode.paged import tpu_refs
from kernels_pallas.hardware import tpu_layout
from kernels_pallas.hardware import tpu_tile
from kernels_pallas.hardware import types as hw_types
from kernels_pallas.transformations import exported
from kernels_pallas.transformations import manual_axes


def step(
    given: paged_rule.Given, is_by_page: bool, rule: rule_lib.Rule
) -> slots_lib.Stepped:
  """Computes the op, see `api`.

  Raises:
    ValueError: If a TPU has no such type, or the sizes do not fit.
  """
  (query, key, value, positions), pool, pages = given
  page_table, num_pages = pages
  exported.check_batch("decode_step", query)
  sizes = paged_tpu_config.sizes_of(query, pool, page_table)
  paged_tpu_config.check(sizes)
  small = pool.small
  pools = [*small.values(), pool.key, pool.value]
  vectors = [query, key, value]
  slot = manual_axes.struct(
      (sizes.call.batch, 1, sizes.call.num_kv_heads), jnp.int32
  )
  outputs = [query, slot, *pools]
  # Where a page lies is only known from the table: the kernel copies it itself.
  anywhere = [pl.BlockSpec(memory_space=pl.ANY)] * len(pools)
  out, slot, *new = pl.pallas_call(
      functools.partial(_kernel, rule, is_by_page, sizes, tuple(small)),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=3,
          grid=(sizes.call.batch,),
          in_specs=[*map(tpu_step.by_sequence, vectors), *anywhere],
          out_specs=[
              tpu_step.by_sequence(query),
              tpu_step.by_sequence(slot, memory_space=pltpu.SMEM),
              *anywhere,
          ],
          scratch_shapes=tpu_refs.scratch_of(sizes, small, pool.key.dtype),
      ),
      out_shape=[manual_axes.struct(x.shape, x.dtype) for x in outputs],
      # Operands are counted from the page table on.
      input_output_aliases={6 + i: 2 + i for i in range(len(pools))},
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel",),
          vmem_limit_bytes=tpu_config.limit(),
          # `Pages` and the choice of slots keep within the pool.
          disable_bounds_checks=True,
      ),
      cost_estimate=paged_tpu_config.cost_estimate(sizes),
      interpret=interpret.mode(),
      name="heavy_hitter_decode_paged",
  )(page_table, num_pages, positions, *vectors, *pools)
  names = (*small, "key", "value")
  pool = slots_lib.Slots(**dict(zip(names, new, strict=True)))
  return out, pool, slot[:, 0]


def _kernel(
    rule: rule_lib.Rule,
    is_by_page: bool,
    sizes: paged_tpu_config.Sizes,
    names: tuple[str, ...],
    *given: hw_types.Ref,
) -> None:
  rest = iter(given)
  take = lambda num: [next(rest) for _ in range(num)]
  table, num_pages, positions = take(3)
  vectors = take(3)
  take(len(names) + 2)  # The pool, which is read where it is written.
  out, slot = take(2)
  sequence = pl.program_id(0)
  pages = tpu_copies.Pages(
      sizes,
      sequence * sizes.call.num_kv_heads,
      table,
      num_pages,
      dict(zip(names, take(len(names)), strict=True)),
      take(2),
      dict(zip(names, take(len(names)), strict=True)),
      take(2),
      *take(3),
  )
  position, scratch = positions[sequence], tpu_refs.Scratch(*take(7))
  refs = tpu_refs.Refs(position, vectors, out, slot, pages, scratch)

  @pl.when(position >= 0)
  def _():
    pages.start_small()
    # The first block comes while slots are chosen from what is small.
    pages.start_block(0, 0, 0)
    _start(sizes, refs)
    pages.await_small()
    tpu_choice.choose(rule, is_by_page, sizes, refs.slot, pages, position)
    _visit_heads(rule, sizes, refs)
    outs = [scratch.outs[k] for k in range(sizes.call.num_kv_heads)]
    out[0] = jnp.concatenate(outs).astype(out.dtype)
    pages.await_writes(scratch.tiles.at[0])

  @pl.when(position < 0)
  def _():
    out[...] = jnp.zeros_like(out)
    for k in range(sizes.call.num_kv_heads):
      slot[0, 0, k] = -1


def _start(sizes: paged_tpu_config.Sizes, refs: tpu_refs.Refs) -> None:
  """Takes queries and new rows apart by head."""
  query, *rows = (x[0].astype(jnp.float32) for x in refs.vectors)
  scratch, size = refs.scratch, sizes.call.num_groups
  for k in range(sizes.call.num_kv_heads):
    scratch.queries[k] = query[k * size : (k + 1) * size]
  for i, row in enumerate(rows):
    numbers, scale = tpu_step.as_stored(row, refs.stored_type)
    read = numbers if scale is None else numbers * scale
    for k in range(sizes.call.num_kv_heads):
      scratch.numbers[i, k] = numbers[k : k + 1]
      scratch.read[i, k] = read[k : k + 1]
      if scale is not None:
        scratch.scales[i, k] = scale[k : k + 1]


class _Softmax(NamedTuple):
  """Of a key head: m [G, 1], l [G, 1] and acc [G, H]."""

  highest: jax.Array
  total: jax.Array
  acc: jax.Array


def _visit_heads(
    rule: rule_lib.Rule, sizes: paged_tpu_config.Sizes, refs: tpu_refs.Refs
) -> None:
  """All key heads, blocks after blocks."""

  def visit(k: jax.Array, turn: jax.Array) -> jax.Array:
    num_blocks = refs.pages.num_blocks(k)
    new_logit, softmax = _softmax_of_new(rule, sizes, refs, k)

    def visit_block(i: jax.Array, carry: _Softmax) -> _Softmax:
      # Buffers alternate across heads, so that no head waits for its first
      # block.
      which = (turn + i) & 1
      _start_next(sizes, refs, k, i, which ^ 1)
      refs.pages.await_block(k, i, which)
      _keep(sizes, refs, k, i, which)
      return _visit(rule, sizes, refs, k, i, which, carry)

    softmax = jax.lax.fori_loop(0, num_blocks, visit_block, softmax)
    _finish(rule, sizes, refs, k, new_logit, softmax)
    return turn + num_blocks

  jax.lax.fori_loop(0, sizes.call.num_kv_heads, visit, jnp.int32(0))


def _start_next(
    sizes: paged_tpu_config.Sizes,
    refs: tpu_refs.Refs,
    k: hw_types.Index,
    i: jax.Array,
    which: hw_types.Index,
) -> None:
  """Asks for the block after block i of head k, if there is one."""
  # After a head's last block comes the next head's first one.
  is_last = i + 1 == refs.pages.num_blocks(k)
  head = k + is_last.astype(jnp.int32)
  block = jnp.where(is_last, 0, i + 1)

  @pl.when(head < sizes.call.num_kv_heads)
  def _():
    refs.pages.start_block(head, block, which)


def _softmax_of_new(
    rule: rule_lib.Rule,
    sizes: paged_tpu_config.Sizes,
    refs: tpu_refs.Refs,
    k: hw_types.Index,
) -> tuple[jax.Array, _Softmax]:
  """The logit of the new token [G, 1], and the softmax of it alone."""
  key, value = refs.scratch.read[0, k], refs.scratch.read[1, k]
  logit = (refs.scratch.queries[k] * key).sum(axis=1, keepdims=True)
  logit = rule_lib.capped(rule.scale * logit, rule)
  acc = jnp.broadcast_to(value, (sizes.call.num_groups, sizes.call.head_dim))
  return logit, _Softmax(logit, jnp.ones_like(logit), acc)


def _visit(
    rule: rule_lib.Rule,
    sizes: paged_tpu_config.Sizes,
    refs: tpu_refs.Refs,
    k: hw_types.Index,
    i: hw_types.Index,
    which: hw_types.Index,
    softmax: _Softmax,
) -> _Softmax:
  """Takes a block into the softmax."""
  pages, dtype = refs.pages, refs.product_type
  rows_of = lambda block: block[which].reshape(sizes.block_slots, -1)
  row_of = lambda name: _row_of(sizes, refs, name, k, i)
  is_seen = rule_lib.sees(row_of("pos"), refs.position, rule)
  slot = jax.lax.broadcasted_iota(jnp.int32, is_seen.shape, 1)
  # A block's last pages may not be there, and what lies in their place is old.
  is_seen &= slot < pages.num_of_block(k, i) * sizes.page_size
  factor = rule.scale
  if "key_scale" in pages.near:
    factor = rule.scale * row_of("key_scale")
  query, (keys, values) = refs.scratch.queries[k], map(rows_of, pages.blocks)
  logits = tpu_step.logits_of(query, keys, factor, rule, dtype)
  logits = jnp.where(is_seen, logits, tpu_tile.FORBIDDEN)
  refs.scratch.logits[i] = logits
  highest = jnp.maximum(softmax.highest, logits.max(axis=1, keepdims=True))
  correction = jnp.exp(softmax.highest - highest)
  weights = jnp.exp(logits - highest)
  total = correction * softmax.total + weights.sum(axis=1, keepdims=True)
  if "value_scale" in pages.near:
    # Scales of pages that are not there may be NaN.
    weights = jnp.where(is_seen, weights * row_of("value_scale"), 0.0)
  added = tpu_step.weighted(weights, values, dtype)
  return _Softmax(highest, total, correction * softmax.acc + added)


def _row_of(
    sizes: paged_tpu_config.Sizes,
    refs: tpu_refs.Refs,
    name: str,
    k: hw_types.Index,
    i: hw_types.Index,
) -> jax.Array:
  """What is small of a block of pages, in a row."""
  return tpu_lanes.to_row(refs.pages.near[name][k, _pages(sizes, i), :])


def _keep(
    sizes: paged_tpu_config.Sizes,
    refs: tpu_refs.Refs,
    k: hw_types.Index,
    i: hw_types.Index,
    which: hw_types.Index,
) -> None:
  """Keeps the rows around the slot if this block has them."""
  page, around = _place(sizes, refs, k)
  # Without a branch, as in the step over slots.
  near = page - i * sizes.block_pages
  is_elsewhere = jnp.where((near >= 0) & (near < sizes.block_pages), 0, 1)
  near = jnp.clip(near, 0, sizes.block_pages - 1)
  for kind, block in enumerate(refs.pages.blocks):
    refs.scratch.tiles[is_elsewhere, k, kind] = block[which, near, around]


def _write(
    sizes: paged_tpu_config.Sizes, refs: tpu_refs.Refs, k: hw_types.Index
) -> None:
  """Sends them back, the new row among them."""
  page, around = _place(sizes, refs, k)
  page, at = refs.pages.page(k, page), refs.slot[0, 0, k]
  for kind, far in enumerate(refs.pages.stored):
    tile, new = refs.scratch.tiles.at[0, k, kind], refs.scratch.numbers[kind, k]
    tile[...] = tpu_step.replaced(
        tile[...], new, at & (sizes.call.tile_rows - 1)
    )
    pltpu.make_async_copy(tile, far.at[page, around], refs.pages.writes).start()


def _place(
    sizes: paged_tpu_config.Sizes, refs: tpu_refs.Refs, k: hw_types.Index
) -> tuple[jax.Array, hw_types.Slice]:
  """The page of a head's slot, and the rows around it there."""
  slot, rows = refs.slot[0, 0, k], sizes.call.tile_rows
  first = (slot % sizes.page_size) & -rows
  return slot // sizes.page_size, pl.ds(tpu_layout.aligned(first, rows), rows)


def _finish(
    rule: rule_lib.Rule,
    sizes: paged_tpu_config.Sizes,
    refs: tpu_refs.Refs,
    k: hw_types.Index,
    new_logit: jax.Array,
    softmax: _Softmax,
) -> None:
  """Out, scores, and what is kept of the new token."""
  # The head's normaliser is final: its kept logits become weights block by
  # block while the next head's keys are on their way.
  pages, inverse = refs.pages, 1 / softmax.total
  refs.scratch.outs[k] = softmax.acc * inverse
  weights_of = lambda logits: jnp.exp(logits - softmax.highest) * inverse
  of_new = tpu_step.joined(weights_of(new_logit), rule)
  slot, score = refs.slot[0, 0, k], pages.near["score"]

  @pl.loop(0, pages.num_blocks(k))
  def _(i: hw_types.Index):
    mass = tpu_step.joined(weights_of(refs.scratch.logits[i]), rule)
    mass = tpu_lanes.to_pages(mass, sizes.page_size)
    first = i * sizes.block_slots
    is_slot = tpu_choice.index_of(mass.shape) == slot - first
    mass = jnp.where(is_slot, of_new, mass)
    old = score[k, _pages(sizes, i), :]
    score[k, _pages(sizes, i), :] = rule_lib.rescored(old, mass, rule)
    pages.start_scores(k, i)

  _write(sizes, refs, k)
  tpu_choice.set_slot(sizes, pages, k, slot, refs.position, refs.scratch.scales)


def _pages(sizes: paged_tpu_config.Sizes, i: hw_types.Index) -> hw_types.Slice:
  """The pages of a block."""
  size = sizes.block_pages
  return pl.ds(tpu_layout.aligned(i * size, size), size)
