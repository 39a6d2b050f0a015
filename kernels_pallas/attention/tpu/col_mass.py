"""Column sums of attention from lse, on a TPU, for rows that outgrow VMEM.

  col_mass_s = sum_t w_t exp(logits_ts - lse_t)

A second pass over the tiles, key tile by key tile, that makes the logits again:
half the products of attention once more. `forward` alone is cheaper where a
row of logits fits into VMEM.
"""

import functools
import math
import types
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas import interpret
from kernels_pallas.attention import visits as visits_lib
from kernels_pallas.attention.tpu import fetch
from kernels_pallas.attention.tpu import forward
from kernels_pallas.attention.tpu import layout
from kernels_pallas.hardware import tpu_layout
from kernels_pallas.hardware import tpu_tile
from kernels_pallas.hardware import types as hw_types
from kernels_pallas.transformations import manual_axes


def col_mass(
    query: Float[Array, "B N T H"],
    key: Float[Array, "B K S H"],
    columns: visits_lib.Visits,
    spans: layout.Spans,
    lse: Float[Array, "B N T"],
    row_weights: Float[Array, "B N T"] | None,
    plan: forward.Plan,
) -> Float[Array, "B N S"]:
  """Sums the weights that each key gets.

  Args:
    query: Of the padded length.
    key: Of the padded length.
    columns: Query tiles of each key tile.
    spans: What partial tiles allow.
    lse: In nats; +inf for padding and where a query has no key.
    row_weights: None is 1.
    plan: Tiles and how they are treated.
  """
  batch, num_heads, _, _ = query.shape
  inputs = _inputs(query, key, columns, spans, lse, row_weights, plan)
  # Queries stream and keys stay: the sums of a tile of keys are written once.
  lanes, block = plan.tiles.lanes_q, plan.tiles.block_kv
  scratch = {"totals": pltpu.VMEM((block, tpu_layout.LANES), jnp.float32)}
  scratch |= fetch.scratch("query", query, plan.keys, lanes)
  result = pl.pallas_call(
      functools.partial(_kernel, plan, (*inputs, "col_mass", *scratch)),
      grid=(batch, num_heads, key.shape[2] // block),
      in_specs=[spec for _, spec in inputs.values()],
      out_specs=pl.BlockSpec((1, 1, 1, block), lambda b, n, c: (b, n, 0, c)),
      out_shape=manual_axes.struct(
          (batch, num_heads, 1, key.shape[2]), jnp.float32
      ),
      scratch_shapes=list(scratch.values()),
      name="attention_col_mass",
      compiler_params=plan.compiler_params,
      cost_estimate=plan.cost,
      interpret=interpret.mode(),
  )(*(array for array, _ in inputs.values()))
  return result[:, :, 0]


def _inputs(
    query: jax.Array,
    key: jax.Array,
    columns: visits_lib.Visits,
    spans: layout.Spans,
    lse: jax.Array,
    row_weights: jax.Array | None,
    plan: forward.Plan,
) -> dict[str, tuple[Any, pl.BlockSpec]]:
  """Arrays and how they come to the kernel, by name."""
  group = query.shape[1] // key.shape[1]
  lists = layout.pack(columns)
  inputs = {"visits": (lists, layout.list_block(lists, lambda c: c))}
  if plan.is_masked:
    inputs |= layout.span_blocks(spans, plan.tiles, by_key=True)
  # In bits, as `exp2` takes them.
  rows = {"lse": lse * math.log2(math.e)}
  if row_weights is not None:
    rows["row_weights"] = row_weights.astype(jnp.float32)
  for name, array in rows.items():
    whole = pl.BlockSpec((1, 1, 1, lse.shape[2]), lambda b, n, c: (b, n, 0, 0))
    inputs[name] = array[:, :, None], whole
  inputs["query"] = query, fetch.block(query, plan.keys, 1)
  block = (1, 1, plan.tiles.block_kv, key.shape[3])
  inputs["key"] = key, pl.BlockSpec(
      block, lambda b, n, c: (b, n // group, c, 0)
  )
  return inputs


def _kernel(
    plan: forward.Plan, names: tuple[str, ...], *refs: hw_types.Ref
) -> None:
  """Treats one column of tiles."""
  at = types.SimpleNamespace(**dict(zip(names, refs, strict=True)))
  place, column = (pl.program_id(0), pl.program_id(1)), pl.program_id(2)
  num_full, num_valid = (at.visits[0, 0, 0, 0, i] for i in range(2))
  at.tile = lambda i: at.visits[0, 0, 0, 0, i + 2]
  lanes = plan.tiles.lanes_q
  queries = fetch.tiles(at, "query", plan.keys, place, lanes)
  # Sums stay apart by lane until the end: one fold a column, not one a tile.
  at.totals[...] = jnp.zeros_like(at.totals)
  key = at.key[0, 0]

  def visit(is_partial: bool, i: hw_types.Index, _: None) -> None:
    here = pl.ds(pl.multiple_of(at.tile(i) * lanes, lanes), lanes)
    logits = plan.logits.of(key, queries.read(i, num_valid))
    if is_partial:
      allowed = _allowed(plan, at, column, here)
      logits = jnp.where(allowed, logits, tpu_tile.FORBIDDEN)
    weights = jnp.exp2(plan.logits.factor * logits - at.lse[0, 0, :, here])
    if hasattr(at, "row_weights"):
      weights *= at.row_weights[0, 0, :, here]
    at.totals[...] += tpu_tile.fold_lanes(weights)

  # Tiles without a mask come first in every list.
  queries.open(0, num_valid)
  full, partial = (functools.partial(visit, flag) for flag in (False, True))
  jax.lax.fori_loop(0, num_full, full, None)
  if plan.is_masked:
    jax.lax.fori_loop(num_full, num_valid, partial, None)
  at.col_mass[0, 0] = at.totals[...].T.sum(axis=0, keepdims=True)


def _allowed(
    plan: forward.Plan,
    at: hw_types.Refs,
    column: hw_types.Index,
    here: hw_types.Slice,
) -> jax.Array:
  block = plan.tiles.block_kv
  starts = at.starts[0, :, here] if hasattr(at, "starts") else None
  spans = starts, at.stops[0, :, here]
  if not hasattr(at, "key_ids"):
    return tpu_tile.allowed(column * block, *spans, block)
  ids = at.query_ids[0, :, here], at.key_ids[0, 0]
  return tpu_tile.allowed(column * block, *spans, block, *ids)
