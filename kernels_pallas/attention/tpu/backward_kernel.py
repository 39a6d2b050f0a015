"""The body of the TPU backward: gradients of one tile of keys at a time.

A grid step owns a tile of keys and walks over the query tiles that meet it, of
all query heads that share the keys. Logits stand transposed, [keys, queries]:
what belongs to a query (lse, delta, its spans) is then a row, which the vector
unit spreads over sublanes for nothing. dQ is kept transposed as well, [head,
queries] = K^T dS^T, so that no tile of logits is ever transposed.
"""

from collections.abc import Callable, Sequence
import functools
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from kernels_pallas.attention.tpu import backward_plan as plan_lib
from kernels_pallas.attention.tpu import backward_sums as sums_lib
from kernels_pallas.hardware import tpu_tile
from kernels_pallas.hardware import types as hw_types

# Dimensions to contract: last with last, last with first.
_NT = (((1,), (1,)), ((), ()))
_NN = (((1,), (0,)), ((), ()))


class Inputs(NamedTuple):
  """Of a grid step: a tile of keys, a chunk of the queries of some heads.

  Letters: G heads, R query tiles of the chunk, P spans, W width of the lists;
  G and W are 1 where the heads share a list.

  Attributes:
    table: int32 [G, W] in SMEM: query tiles to visit, counted from the first.
    ranges: int32 [G, 4] in SMEM: entries of the table that lie in the chunk,
      first and one past the last: of those without a mask, of those with one.
    query: [G, R, block_q, H].
    d_out: As `query`.
    key: [block_kv, H].
    value: [block_kv, H].
    lse: float32 [G, R, block_q], in the unit of the logits.
    delta: float32 [G, R, block_q].
    offsets: int32 [P, R, block_q]: minus the start of the span, minus 2^31.
    lengths: int32 [P, R, block_q]: keys in the span, minus 2^31, so that
      comparing with signs is comparing numbers of 32 bits without.
    query_ids: int32 [R, block_q] or None.
    key_ids: int32 [1, block_kv] or None.
  """

  table: hw_types.Ref
  ranges: hw_types.Ref
  query: hw_types.Ref
  d_out: hw_types.Ref
  key: hw_types.Ref
  value: hw_types.Ref
  lse: hw_types.Ref
  delta: hw_types.Ref
  offsets: hw_types.Ref
  lengths: hw_types.Ref
  query_ids: hw_types.Ref
  key_ids: hw_types.Ref


class Outputs(NamedTuple):
  """Of a grid step; `d_query` stays while the tiles of keys go by.

  Attributes:
    d_query: [G, R, block_q, H].
    d_key: [block_kv, H]; None where sums go to HBM.
    d_value: As `d_key`.
    sums: Where they go; None where one part is all.
  """

  d_query: hw_types.Ref
  d_key: hw_types.Ref
  d_value: hw_types.Ref
  sums: sums_lib.Sums | None = None


class Scratch(NamedTuple):
  """What is summed, in float32, and what a tile of keys prepares once."""

  d_query: hw_types.Ref  # [G, R, H, block_q]
  d_key: hw_types.Ref  # [block_kv, H]
  d_value: hw_types.Ref  # [block_kv, H]
  key_transposed: hw_types.Ref  # [H, block_kv]
  key_ids: (
      hw_types.Ref
  )  # int32 [block_kv, 128], equal in a row; None without ids.


def kernel(
    inputs: Inputs,
    outputs: Outputs,
    scratch: Scratch,
    *,
    logits: tpu_tile.Logits,
    plan: plan_lib.Plan,
) -> None:
  """Adds one tile of keys."""
  ids = [pl.program_id(axis) for axis in range(len(plan.grid))]
  _, _, chunk, key_tile = plan.place(*ids)
  sums, step = outputs.sums, _step_of_sums(plan, ids)
  if sums is not None and step is not None:
    sums_lib.begin(sums, step)

  @pl.when(key_tile == 0)
  def _():
    scratch.d_query[...] = jnp.zeros_like(scratch.d_query)

  # dK and dV of this tile begin at 0; dQ goes on from the tile before.
  _prepare_keys(inputs, scratch)
  add_tile = functools.partial(
      _add_tile, inputs, scratch, logits, chunk, key_tile
  )
  _visit(inputs, add_tile)
  scale = logits.scale
  if sums is not None and step is not None:
    sums_lib.end(sums, step, (scratch.d_key, scratch.d_value), scale)
  else:
    d_key, d_value = scale * scratch.d_key[...], scratch.d_value[...]
    outputs.d_key[...] = d_key.astype(outputs.d_key.dtype)
    outputs.d_value[...] = d_value.astype(outputs.d_value.dtype)

  @pl.when(key_tile == plan.num_key_tiles - 1)
  def _():
    _write_d_query(outputs, scratch, scale)


def _step_of_sums(
    plan: plan_lib.Plan, ids: Sequence[hw_types.Index]
) -> sums_lib.Step | None:
  """Where in the sums of a head a step is; None where one part is all."""
  if plan.num_parts == 1:
    return None
  core, *places, key_tile = ids
  batch, head, *_ = plan.own(core, *places)
  # Of this core: chunks of a unit are neighbours.
  part = places[2] * plan.grid[4] + places[3]
  parts = part, plan.parts_of_core
  tiles = key_tile, plan.num_key_tiles
  return sums_lib.Step(core, batch, head, *parts, *tiles)


def _prepare_keys(inputs: Inputs, scratch: Scratch) -> None:
  scratch.d_key[...] = jnp.zeros_like(scratch.d_key)
  scratch.d_value[...] = jnp.zeros_like(scratch.d_value)
  # Transposed once for all query tiles, as the product for d_query takes it.
  scratch.key_transposed[...] = inputs.key[...].T
  if inputs.key_ids is not None:
    lanes, block_kv = scratch.key_ids.shape[1], scratch.key_ids.shape[0]
    ids = jnp.broadcast_to(inputs.key_ids[...], (lanes, block_kv))
    scratch.key_ids[...] = ids.T


def _visit(
    inputs: Inputs,
    add_tile: Callable[[bool, hw_types.Index, hw_types.Index], None],
) -> None:
  """Calls add_tile(is_masked, head, entry) on each entry of the lists."""

  def visit_head(head: hw_types.Index, carry: None):
    row = head if inputs.table.shape[0] > 1 else 0
    # Two loops, so that the body without a mask carries no selects.
    for is_masked in (False, True):
      start = inputs.ranges[row, 2 * is_masked]
      stop = inputs.ranges[row, 2 * is_masked + 1]

      def visit_tile(
          entry: hw_types.Index, carry: None, is_masked: bool = is_masked
      ):
        add_tile(is_masked, head, inputs.table[row, entry])
        return carry

      jax.lax.fori_loop(start, stop, visit_tile, None)
    return carry

  jax.lax.fori_loop(0, inputs.query.shape[0], visit_head, None)


def _add_tile(
    inputs: Inputs,
    scratch: Scratch,
    logits: tpu_tile.Logits,
    chunk: hw_types.Index,
    key_tile: hw_types.Index,
    is_masked: bool,
    head: hw_types.Index,
    query_tile: hw_types.Index,
) -> None:
  """Adds what a tile of queries and the tile of keys give each other."""
  tile = query_tile - chunk * inputs.query.shape[1]
  row = pl.ds(tile, 1)
  query, d_out = inputs.query[head, tile], inputs.d_out[head, tile]
  dtype = query.dtype
  # Of six orders of the products the shortest schedule on v6e; on v5e one was
  # 2 % shorter, but 14 % longer on v6e.
  values = logits.of(inputs.key[...], query)
  weights = jnp.exp2(logits.factor * (values - inputs.lse[head, row, :]))
  if is_masked:
    allowed = _allowed(inputs, scratch, key_tile, row)
    # Of forbidden pairs, whose exponent has no bound, no infinity is left.
    weights = jnp.where(allowed, weights, 0.0)
  scratch.d_value[...] += tpu_tile.multiply(weights.astype(dtype), d_out, _NN)
  d_weights = tpu_tile.multiply(inputs.value[...], d_out, _NT)
  d_logits = weights * (d_weights - inputs.delta[head, row, :])
  if logits.soft_cap is not None:
    # d/dx of c tanh(x / c) is 1 - tanh^2.
    tanh = values * (1.0 / logits.soft_cap)
    d_logits = d_logits * (1.0 - tanh * tanh)
  d_logits = d_logits.astype(dtype)
  scratch.d_key[...] += tpu_tile.multiply(d_logits, query, _NN)
  scratch.d_query[head, tile] += tpu_tile.multiply(
      scratch.key_transposed[...], d_logits, _NN
  )


def _allowed(
    inputs: Inputs,
    scratch: Scratch,
    key_tile: hw_types.Index,
    row: hw_types.Slice,
) -> jax.Array:
  """Bool [block_kv, block_q]: is the key in a span, are the ids equal?"""
  block_kv, block_q = inputs.key.shape[0], inputs.query.shape[2]
  keys = jax.lax.broadcasted_iota(jnp.int32, (block_kv, block_q), 0)

  def is_in_span(span: int):
    # One comparison: keys before the start have wrapped to large numbers.
    offset = inputs.offsets[span, row, :] + key_tile * block_kv
    return keys + offset < inputs.lengths[span, row, :]

  spans = (is_in_span(span) for span in range(inputs.offsets.shape[0]))
  allowed = functools.reduce(jnp.logical_or, spans)
  if inputs.query_ids is not None:
    lanes = scratch.key_ids.shape[1]
    key_ids = jnp.tile(scratch.key_ids[...], (1, block_q // lanes))
    allowed = allowed & (key_ids == inputs.query_ids[row, :])
  return allowed


def _write_d_query(outputs: Outputs, scratch: Scratch, scale: float) -> None:
  num_heads, num_tiles = outputs.d_query.shape[:2]

  def write(index: hw_types.Index, carry: None):
    place = (index // num_tiles, index % num_tiles)
    d_query = (scale * scratch.d_query[place]).T
    outputs.d_query[place] = d_query.astype(outputs.d_query.dtype)
    return carry

  jax.lax.fori_loop(0, num_heads * num_tiles, write, None)
