"""Gradients of attention on a TPU, all three in one kernel.

For each tile of keys the kernel visits the query tiles that meet it, of all
query heads that share the keys: five products a pair of tiles. dK and dV are
summed over heads and queries in VMEM and written once; K and V are never
repeated. The queries of a group of heads stay in VMEM, with their dQ, while all
tiles of keys go by.

If they do not fit they are cut into parts, each a number of heads and a chunk
of positions, which add to dK and dV in HBM one after the other
(`backward_sums`). Time is that of the tiles visited, whatever the parts.

Letters: B batch, N query heads, K key heads, T queries, S keys, P spans; U
units, the parts of the heads of all groups; G heads of a unit; R query tiles,
r those of a chunk, and C key tiles.
"""

from collections.abc import Callable
import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels_pallas import interpret
from kernels_pallas import masks
from kernels_pallas.attention import visits as visits_lib
from kernels_pallas.attention.tpu import backward_blocks as blocks_lib
from kernels_pallas.attention.tpu import backward_kernel as kernel_lib
from kernels_pallas.attention.tpu import backward_plan as plan_lib
from kernels_pallas.attention.tpu import backward_sums as sums_lib
from kernels_pallas.attention.tpu import layout
from kernels_pallas.hardware import tpu_layout
from kernels_pallas.hardware import tpu_tile
from kernels_pallas.hardware import types as hw_types
from kernels_pallas.transformations import manual_axes


def backward(
    query: Float[Array, "B N T H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    columns: visits_lib.Visits,
    spans: tuple[Int[masks.AnyArray, "#B P T"], Int[masks.AnyArray, "#B P T"]],
    query_ids: Int[masks.AnyArray, "#B T"] | None,
    key_ids: Int[masks.AnyArray, "#B S"] | None,
    lse: Float[Array, "B N T"],
    delta: Float[Array, "B N T"],
    d_out: Float[Array, "B N T H"],
    *,
    scale: float,
    logits_soft_cap: float | None,
    block_q: int,
    block_kv: int,
    vmem_limit_bytes: int | None = None,
    num_cores: int | None = None,
) -> tuple[
    Float[Array, "B N T H"], Float[Array, "B K S H"], Float[Array, "B K S H"]
]:
  """Computes the cotangents of query, key and value.

  With s = scale q k, P = exp(s - lse) and dS = P * (dO V^T - delta):
  dV = P^T dO, dK = scale dS^T Q, dQ = scale dS K.

  Args:
    query: Padded to whole tiles, as every array here.
    key: As `query`.
    value: As `query`.
    columns: Query tiles of each key tile, `visits.by_key`. Tiles where
      something is forbidden, or padded, are in the second part of the lists.
    spans: Starts and stops of the keys of each query, int32; see `masks.Mask`.
    query_ids: int32; None where ids do not matter.
    key_ids: int32; None exactly where `query_ids` is.
    lse: Log-sum-exp of the logits, float32; +inf for queries without keys.
    delta: Sum over the head's dimension of d_out * out, float32.
    d_out: Cotangent of the output, of the type of `query`.
    scale: Factor of the logits.
    logits_soft_cap: c in c tanh(s / c); None is off.
    block_q: Queries of a tile, a multiple of 128.
    block_kv: Keys of a tile, a multiple of 128.
    vmem_limit_bytes: VMEM that the kernel may take; None takes 15/16 of it.
    num_cores: Cores that work as one; None asks the chip.

  Returns:
    dQ, dK and dV in the types of query, key and value; 0 for queries and keys
    that meet nothing.

  Raises:
    ValueError: If tiles are no multiples of 128 or do not fit into VMEM.
  """
  _check_blocks(block_q, block_kv)
  logits = tpu_tile.Logits(scale, logits_soft_cap)
  # How much of the queries is in VMEM at once; everything below follows from
  # it.
  plan = plan_lib.make(
      _sizes(query, key),
      layout.Tiles(block_q, block_kv),
      num_spans=spans[0].shape[1],
      has_ids=query_ids is not None,
      limit=vmem_limit_bytes or _default_limit(),
      num_cores=num_cores or tpu_layout.tpu_info().num_cores,
  )
  inputs = kernel_lib.Inputs(
      **blocks_lib.lists_of(plan, columns),
      query=blocks_lib.by_tile(plan, query),
      d_out=blocks_lib.by_tile(plan, d_out),
      key=key,
      value=value,
      lse=blocks_lib.by_row(plan, lse / logits.unit),
      delta=blocks_lib.by_row(plan, delta),
      **blocks_lib.spans_of(plan, spans, query_ids, key_ids),
  )
  call = _pallas_call(plan, inputs, plan_lib.cost(plan, columns), logits)
  d_query, d_key, d_value, *_ = call(inputs)
  # Tiles of a head lie one after the other: the reshape copies nothing.
  d_query = d_query.reshape(query.shape)
  if plan.num_parts > 1:
    total = functools.partial(sums_lib.total, dtype=query.dtype)
    d_key, d_value = total(d_key), total(d_value)
  return d_query, d_key, d_value


def _pallas_call(
    plan: plan_lib.Plan,
    inputs: kernel_lib.Inputs,
    cost: pl.CostEstimate | None,
    logits: tpu_tile.Logits,
) -> Callable[[kernel_lib.Inputs], list[jax.Array]]:
  dtype = inputs.query.dtype
  blocks = blocks_lib.blocks_of(plan, inputs)
  scratch = blocks_lib.scratch_of(plan, dtype)
  if plan.num_parts == 1:
    semantics = ("parallel", "parallel", "parallel", "arbitrary")
    sums = [manual_axes.struct(inputs.key.shape, dtype)] * 2
    sums_blocks = [blocks.key] * 2
  else:
    # Parts are added one after the other; what cores share comes first.
    semantics = ("parallel",) + ("arbitrary",) * 5
    sums = sums_lib.outputs(plan, dtype)
    sums_blocks = [pl.BlockSpec(memory_space=pl.ANY)] * len(sums)
    scratch += sums_lib.scratch(plan, dtype)
  return pl.pallas_call(
      functools.partial(_kernel, logits=logits, plan=plan),
      name="attention_backward",
      grid=plan.grid,
      in_specs=(blocks,),
      out_specs=[blocks.query, *sums_blocks],
      out_shape=[manual_axes.struct(inputs.query.shape, dtype), *sums],
      scratch_shapes=scratch,
      input_output_aliases=_aliases(plan),
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=semantics, vmem_limit_bytes=plan.limit
      ),
      cost_estimate=cost,
      interpret=interpret.mode(),
  )


def _kernel(
    inputs: kernel_lib.Inputs,
    d_query: hw_types.Ref,
    *refs: hw_types.Ref,
    logits: tpu_tile.Logits,
    plan: plan_lib.Plan,
) -> None:
  """Names what `pallas_call` gives in order."""
  num_scratch = 4 + plan.has_ids
  if plan.num_parts == 1:
    d_key, d_value, *scratch = refs
    outputs = kernel_lib.Outputs(d_query, d_key, d_value)
  else:
    # The sums' arrays, then the kernel's scratch, then the sums' buffers.
    first = sums_lib.num_outputs(plan, inputs.query.dtype)
    scratch = refs[first : first + num_scratch]
    sums = sums_lib.named((*refs[:first], *refs[first + num_scratch :]))
    outputs = kernel_lib.Outputs(d_query, None, None, sums)
  scratch = kernel_lib.Scratch(*scratch, *[None] * (not plan.has_ids))
  kernel_lib.kernel(inputs, outputs, scratch, logits=logits, plan=plan)


def _aliases(plan: plan_lib.Plan) -> dict[int, int]:
  """Lets dQ take the place of d_out, where that is a copy in any case.

  Where heads fill sublanes, arrays come with heads next to head_dim, and are
  copied to be tiled; others come as they are needed and would be copied for
  this. No block of d_out is read after its dQ is written.
  """
  num_heads = plan.sizes.num_heads
  is_copy = num_heads % 8 == 0 or num_heads in (2, 4)
  d_out = kernel_lib.Inputs._fields.index("d_out")
  return {d_out: 0} if is_copy else {}


def _sizes(query: Array, key: Array) -> layout.Sizes:
  batch, num_heads, num_queries, head_dim = query.shape
  return layout.Sizes(
      batch,
      num_heads,
      key.shape[1],
      num_queries,
      key.shape[2],
      head_dim,
      query.dtype.itemsize,
  )


def _check_blocks(block_q: int, block_kv: int) -> None:
  for name, block in (("block_q", block_q), ("block_kv", block_kv)):
    if block < 1 or block % tpu_layout.LANES:
      raise ValueError(
          f"{name}={block} must be a multiple of the {tpu_layout.LANES} lanes"
          " of a TPU"
      )


def _default_limit() -> int:
  return tpu_layout.tpu_info().vmem_capacity_bytes * 15 // 16
