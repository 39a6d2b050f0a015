"""Forward pass of attention over lists of tiles, on a TPU.

All tiles of a row of the mask are treated together, in three sweeps. With S_j
the logits of key tile j by the queries of the row, kept in VMEM,

  1  S_j = K_j Q^T, and the running maximum m over the keys
  2  E_j = exp(S_j - m), which takes the place of S_j; l = sum E_j; O += V_j E_j
  3  col_mass_j += E_j (w / l), if asked for

so that nothing has to be rescaled and exact column sums cost neither a product
nor an exponential more. Logits lie transposed, [keys, queries]: maxima and sums
over keys then are operations between whole registers, and what belongs to a
query lies along the lanes, as in HBM.

Sweep 3 of a row is done along sweep 1 of the next one, whose products leave the
vector units idle: E_j is read before the new logits are written over it. Where
the next row has a partial tile, whose mask keeps those units busy, or none, it
is done alone, as it is for the last row.

Values come as they are in HBM. Resident ones are turned once a head, in VMEM,
so that positions lie along the lanes as the product with weights wants them;
streamed ones are turned tile by tile.

Where a row is longer than VMEM it is cut into chunks, between which O and l are
rescaled (https://arxiv.org/abs/2205.14135); column sums need a single chunk.

Letters: B batch, N query heads, K key heads, T queries, S keys, H head size, R
query tiles, W width of the lists of tiles, P spans. T and S are multiples of
the tiles.
"""

import dataclasses
import functools
import types
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas import interpret
from kernels_pallas.attention import visits as visits_lib
from kernels_pallas.attention.tpu import fetch
from kernels_pallas.attention.tpu import layout
from kernels_pallas.hardware import tpu_layout
from kernels_pallas.hardware import tpu_tile
from kernels_pallas.hardware import types as hw_types
from kernels_pallas.transformations import manual_axes

_PRODUCT = (((1,), (0,)), ((), ()))
_FIRST_BY_FIRST = (((0,), (0,)), ((), ()))
# Queries whose logits are made together; more would outgrow the registers.
_LANES_AT_ONCE = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """How the forward pass is made.

  Attributes:
    tiles: Queries and keys of a tile.
    logits: Scale and soft cap.
    chunk: Tiles of a row whose logits are in VMEM together.
    keys: Where keys and values are.
    is_masked: Whether any tile is partial.
    emits_col_mass: Whether columns are summed; needs rows of one chunk.
    vmem_limit_bytes: VMEM that the kernel may take.
    cost: For XLA's scheduler.
  """

  tiles: layout.Tiles
  logits: tpu_tile.Logits
  chunk: int
  keys: fetch.Place
  is_masked: bool
  emits_col_mass: bool
  vmem_limit_bytes: int
  cost: pl.CostEstimate | None

  @property
  def compiler_params(self) -> pltpu.CompilerParams:
    """Of a grid of batch, head and what a row of it has in turn."""
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"),
        vmem_limit_bytes=self.vmem_limit_bytes,
    )


class Result(NamedTuple):
  """Of padded length; `col_mass` is None unless the plan emits it."""

  out: Float[Array, "B N T H"]
  lse: Float[Array, "B N T"]
  col_mass: Float[Array, "B N S"] | None


def forward(
    query: Float[Array, "B N T H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    rows: visits_lib.Visits,
    spans: layout.Spans,
    sink_logits: Float[Array, "N"] | None,
    row_weights: Float[Array, "B N T"] | None,
    plan: Plan,
) -> Result:
  """Computes out, lse and, if the plan says so, col_mass.

  Args:
    query: Of the padded length.
    key: Of the padded length.
    value: As key.
    rows: Key tiles of each query tile.
    spans: What partial tiles allow.
    sink_logits: A logit per head that has no value.
    row_weights: Weights in col_mass; must be 0 for padding. None is 1.
    plan: Tiles and how they are treated.

  Returns:
    Queries without a key get out 0 and lse -inf.
  """
  inputs = _inputs(query, rows, spans, sink_logits, row_weights, plan)
  group = query.shape[1] // key.shape[1]
  for name, array in (("key", key), ("value", value)):
    inputs[name] = array, fetch.block(array, plan.keys, group)
  outputs = _outputs(query, key.shape[2], plan)
  scratch = _scratch(key, value, plan)
  results = pl.pallas_call(
      functools.partial(_kernel, plan, (*inputs, *outputs, *scratch), group),
      grid=(*query.shape[:2], query.shape[2] // plan.tiles.lanes_q),
      in_specs=[spec for _, spec in inputs.values()],
      out_specs=[spec for _, spec in outputs.values()],
      out_shape=[shape for shape, _ in outputs.values()],
      scratch_shapes=list(scratch.values()),
      name="attention_strip" if plan.emits_col_mass else "attention_forward",
      compiler_params=plan.compiler_params,
      cost_estimate=plan.cost,
      interpret=interpret.mode(),
  )(*(array for array, _ in inputs.values()))
  out, lse = results[0], results[1][:, :, 0]
  return Result(out, lse, results[2][:, :, 0] if len(results) > 2 else None)


def _inputs(
    query: jax.Array,
    rows: visits_lib.Visits,
    spans: layout.Spans,
    sink_logits: jax.Array | None,
    row_weights: jax.Array | None,
    plan: Plan,
) -> dict[str, tuple[Any, pl.BlockSpec]]:
  """Arrays but keys and values, and how they come to the kernel, by name."""
  lists = layout.pack(rows)
  inputs = {"visits": (lists, layout.list_block(lists, lambda r: r))}
  if plan.emits_col_mass:
    # Sweep 3 of a row is done during the next one, which so needs both lists.
    before = layout.list_block(lists, lambda r: jnp.maximum(r - 1, 0))
    inputs["visits_before"] = lists, before
  if sink_logits is not None:
    sink = sink_logits.astype(jnp.float32)
    inputs["sink"] = sink, pl.BlockSpec(memory_space=pltpu.SMEM)
  if plan.is_masked:
    inputs |= layout.span_blocks(spans, plan.tiles)
  if row_weights is not None and plan.emits_col_mass:
    spec = pl.BlockSpec(
        (1, 1, 1, plan.tiles.lanes_q), lambda b, n, r: (b, n, 0, r)
    )
    inputs["row_weights"] = row_weights[:, :, None].astype(jnp.float32), spec
  block = (1, 1, plan.tiles.lanes_q, query.shape[3])
  inputs["query"] = query, pl.BlockSpec(block, lambda b, n, r: (b, n, r, 0))
  return inputs


def _outputs(
    query: jax.Array, num_keys: int, plan: Plan
) -> dict[str, tuple[jax.ShapeDtypeStruct, pl.BlockSpec]]:
  batch, num_heads, num_queries, head_dim = query.shape
  struct, lanes = manual_axes.struct, plan.tiles.lanes_q
  lse = struct((batch, num_heads, 1, num_queries), jnp.float32)
  col_mass = struct((batch, num_heads, 1, num_keys), jnp.float32)
  out = pl.BlockSpec((1, 1, lanes, head_dim), lambda b, n, r: (b, n, r, 0))
  row = pl.BlockSpec((1, 1, 1, lanes), lambda b, n, r: (b, n, 0, r))
  whole = pl.BlockSpec((1, 1, 1, num_keys), lambda b, n, r: (b, n, 0, 0))
  outputs = {"out": (struct(query.shape, query.dtype), out), "lse": (lse, row)}
  if plan.emits_col_mass:
    outputs["col_mass"] = col_mass, whole
  return outputs


def _scratch(key: jax.Array, value: jax.Array, plan: Plan) -> dict[str, Any]:
  tiles, head_dim = plan.tiles, key.shape[3]
  strip = (plan.chunk * tiles.block_kv, tiles.lanes_q)
  scratch = {
      "strip": pltpu.VMEM(strip, jnp.float32),
      "out_t": pltpu.VMEM((head_dim, tiles.lanes_q), jnp.float32),
  }
  if plan.emits_col_mass:
    scratch["weights"] = pltpu.VMEM((1, tiles.lanes_q), jnp.float32)
  scratch |= fetch.scratch("key", key, plan.keys, tiles.block_kv)
  if plan.keys == "hbm":
    return scratch | fetch.scratch("value", value, plan.keys, tiles.block_kv)
  shape = (head_dim, value.shape[2])
  scratch["value_t"] = pltpu.VMEM(shape, value.dtype)
  return scratch


def _kernel(
    plan: Plan, names: tuple[str, ...], group: int, *refs: hw_types.Ref
) -> None:
  """Treats one row of tiles."""
  at = types.SimpleNamespace(**dict(zip(names, refs, strict=True)))
  at.head, at.row = pl.program_id(1), pl.program_id(2)
  at.last_row = pl.num_programs(2) - 1
  at.num_full, at.num_valid = (at.visits[0, 0, 0, 0, i] for i in range(2))
  at.tile = lambda i: at.visits[0, 0, 0, 0, i + 2]
  place = pl.program_id(0), at.head // group
  block = plan.tiles.block_kv
  keys, values = (
      fetch.tiles(at, name, plan.keys, place, block)
      for name in ("key", "value")
  )
  if plan.keys != "hbm":
    _turn_values(plan, at)
  if plan.emits_col_mass:
    _start_col_mass(plan, at)
  at.out_t[...] = jnp.zeros_like(at.out_t)
  row = (1, plan.tiles.lanes_q)
  # A finite floor: the difference of two empty rows is 0, not NaN.
  state = jnp.full(row, tpu_tile.FLOOR, jnp.float32), jnp.zeros(
      row, jnp.float32
  )
  visit = functools.partial(_visit_chunk, plan, at, keys, values)
  width = at.visits.shape[-1] - 2
  # A strip that holds the whole row needs no correction between chunks.
  if plan.chunk >= width:
    state = visit(0, state)
  else:
    num_chunks = pl.cdiv(at.num_valid, plan.chunk)
    state = jax.lax.fori_loop(0, num_chunks, visit, state)
  inverse = _finish_row(plan, at, *state)
  if plan.emits_col_mass:
    _finish_col_mass(plan, at, inverse)


def _turn_values(plan: Plan, at: hw_types.Refs) -> None:
  """Values with positions last, made at the first row of a head."""

  @pl.when(at.row == 0)
  def _():
    def visit(tile: hw_types.Index, _: None):
      here = _slot(plan, tile)
      at.value_t[:, here] = at.value[0, 0, here].T

    num_tiles = at.value_t.shape[1] // plan.tiles.block_kv
    jax.lax.fori_loop(0, num_tiles, visit, None)


def _visit_chunk(
    plan: Plan,
    at: hw_types.Refs,
    keys: fetch.Resident | fetch.Streamed,
    values: fetch.Resident | fetch.Streamed,
    chunk: hw_types.Index,
    state: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
  """Takes the next tiles of the row into account."""
  highest_before, total = state
  low = chunk * plan.chunk
  high = jnp.minimum(at.num_valid, low + plan.chunk)
  middle = jnp.clip(at.num_full, low, high)
  keys.open(low, high)
  values.open(low, high)
  # All logits of the chunk first: its weights are then final, and no product
  # has to be scaled again tile by tile.
  highest = _sweep_logits(plan, at, keys, low, middle, high)
  highest = jnp.maximum(highest.max(axis=0, keepdims=True), highest_before)
  if plan.chunk < at.visits.shape[-1] - 2:
    # The maximum has grown: what was summed before counts by less.
    shrink = jnp.exp2(plan.logits.factor * (highest_before - highest))
    at.out_t[...] *= shrink
    total *= shrink
  sums = _sweep_weights(plan, at, values, low, high, highest)
  return highest, total + sums.sum(axis=0, keepdims=True)


def _sweep_logits(
    plan: Plan,
    at: hw_types.Refs,
    keys: fetch.Resident | fetch.Streamed,
    low: hw_types.Index,
    middle: hw_types.Index,
    high: hw_types.Index,
) -> jax.Array:
  """Writes the logits of full, then of partial tiles; returns maxima [8, q]."""
  query = at.query[0, 0]
  sub = min(_LANES_AT_ONCE, plan.tiles.lanes_q)

  def visit(is_partial: bool, i: hw_types.Index, highest: jax.Array):
    key = keys.read(i, high)
    if plan.emits_col_mass and not is_partial:
      _add_row_before(plan, at, i)
    parts = []
    # In pieces: logits of all the lanes would outgrow the registers.
    for first in range(0, plan.tiles.lanes_q, sub):
      lanes = slice(first, first + sub)
      logits = plan.logits.of(key, query[lanes])
      if is_partial:
        allowed = _allowed(plan, at, at.tile(i), lanes)
        logits = jnp.where(allowed, logits, tpu_tile.FORBIDDEN)
      at.strip[_slot(plan, i - low), lanes] = logits
      parts.append(tpu_tile.fold_sublanes(logits, "max"))
    return jnp.maximum(highest, jnp.concatenate(parts, axis=1))

  shape = (8, plan.tiles.lanes_q)
  highest = jnp.full(shape, tpu_tile.FLOOR, jnp.float32)
  full, partial = (functools.partial(visit, flag) for flag in (False, True))
  highest = jax.lax.fori_loop(low, middle, full, highest)
  if plan.emits_col_mass:
    # The row before may have had more tiles than this one has full ones.
    alone = lambda i, _: _add_row_before(plan, at, i)
    jax.lax.fori_loop(middle, at.num_before, alone, None)
  if plan.is_masked:
    highest = jax.lax.fori_loop(middle, high, partial, highest)
  return highest


def _allowed(
    plan: Plan, at: hw_types.Refs, tile: hw_types.Index, lanes: slice
) -> jax.Array:
  block = plan.tiles.block_kv
  starts = at.starts[0, :, lanes] if hasattr(at, "starts") else None
  spans = starts, at.stops[0, :, lanes]
  if not hasattr(at, "key_ids"):
    return tpu_tile.allowed(tile * block, *spans, block)
  ids = at.query_ids[0, :, lanes], at.key_ids[0, tile]
  return tpu_tile.allowed(tile * block, *spans, block, *ids)


def _sweep_weights(
    plan: Plan,
    at: hw_types.Refs,
    values: fetch.Resident | fetch.Streamed,
    low: hw_types.Index,
    high: hw_types.Index,
    highest: jax.Array,
) -> jax.Array:
  """Adds weights times values to `out_t`; returns sums of weights [8, q]."""

  def visit(i: hw_types.Index, sums: jax.Array):
    slot = _slot(plan, i - low)
    weights = jnp.exp2(plan.logits.factor * (at.strip[slot, :] - highest))
    if plan.emits_col_mass:
      at.strip[slot, :] = weights
    if plan.keys == "hbm":
      value, product = values.read(i, high), _FIRST_BY_FIRST
    else:
      value, product = at.value_t[:, _slot(plan, at.tile(i))], _PRODUCT
    at.out_t[...] += tpu_tile.multiply(
        value, weights.astype(value.dtype), product
    )
    return sums + tpu_tile.fold_sublanes(weights, "sum")

  sums = jnp.zeros((8, plan.tiles.lanes_q), jnp.float32)
  return jax.lax.fori_loop(low, high, visit, sums)


def _finish_row(
    plan: Plan, at: hw_types.Refs, highest: jax.Array, total: jax.Array
) -> jax.Array:
  """Writes out and lse; returns exp(highest - lse), 0 where nothing is."""
  highest = highest * plan.logits.unit
  factor = 1.0
  if hasattr(at, "sink"):
    sink = at.sink[at.head]
    # The sink joins after all keys, as one more of value 0.
    top = jnp.maximum(highest, sink)
    factor = jnp.exp(highest - top)
    total, highest = factor * total + jnp.exp(sink - top), top
  is_empty = total == 0.0
  safe = jnp.where(is_empty, 1.0, total)
  at.lse[0, 0] = jnp.where(is_empty, -jnp.inf, highest + jnp.log(safe))
  # The sink is part of the divisor and adds nothing to the sum.
  inverse = jnp.where(is_empty, 0.0, factor / safe)
  at.out[0, 0] = (at.out_t[...] * inverse).T.astype(at.out.dtype)
  return inverse


def _start_col_mass(plan: Plan, at: hw_types.Refs) -> None:
  """Nothing is summed yet at the first row of a head."""
  # Column sums of a row wait for its divisor: they are made while the next
  # row makes its logits, whose products leave the vector units idle.
  at.num_before = jnp.where(at.row == 0, 0, at.visits_before[0, 0, 0, 0, 1])

  @pl.when(at.row == 0)
  def _():
    at.col_mass[...] = jnp.zeros_like(at.col_mass)


def _add_row_before(plan: Plan, at: hw_types.Refs, i: hw_types.Index) -> None:
  """Sweep 3 of the i-th tile of the row before, if it had as many."""
  tile = at.visits_before[0, 0, 0, 0, i + 2]
  sums = _column_sums(plan, at, i)
  # A slot that nothing was written to holds anything, even NaN.
  at.col_mass[0, 0, :, _slot(plan, tile)] += jnp.where(
      i < at.num_before, sums, 0.0
  )


def _column_sums(plan: Plan, at: hw_types.Refs, i: hw_types.Index) -> jax.Array:
  """Sums of the weights in a slot over the queries, [1, keys]."""
  weights = at.strip[_slot(plan, i), :] * at.weights[...]
  return tpu_tile.fold_lanes(weights).T.sum(axis=0, keepdims=True)


def _finish_col_mass(plan: Plan, at: hw_types.Refs, inverse: jax.Array) -> None:
  """Keeps what weights are to be multiplied by; sweep 3 of the last row."""
  if hasattr(at, "row_weights"):
    inverse = inverse * at.row_weights[0, 0]
  at.weights[...] = inverse

  @pl.when(at.row == at.last_row)
  def _():
    def visit(i: hw_types.Index, _: None):
      here = _slot(plan, at.tile(i))
      at.col_mass[0, 0, :, here] += _column_sums(plan, at, i)

    jax.lax.fori_loop(0, at.num_valid, visit, None)


def _slot(plan: Plan, i: hw_types.Index) -> hw_types.Slice:
  block = plan.tiles.block_kv
  return pl.ds(tpu_layout.aligned(i * block, block), block)
