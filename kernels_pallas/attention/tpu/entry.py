"""Attention on a TPU: chooses tiles, lays arrays out, calls, undoes.

A mask and a selection are alike to the kernels: lists of tiles.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas import masks
from kernels_pallas import output
from kernels_pallas import selection as selection_lib
from kernels_pallas.attention import differentiable
from kernels_pallas.attention.tpu import col_mass as tpu_col_mass
from kernels_pallas.attention.tpu import forward as tpu_forward
from kernels_pallas.attention.tpu import layout
from kernels_pallas.attention.tpu import lists
from kernels_pallas.attention.tpu import plan as plan_lib
from kernels_pallas.attention.tpu import row_products as row_products_lib
from kernels_pallas.hardware import tpu_layout
from kernels_pallas.hardware import tpu_tile

Config = plan_lib.AttentionTpuConfig
why_not = plan_lib.why_not
row_products = row_products_lib.row_products


def forward(
    inputs: differentiable.Inputs, spec: differentiable.AttentionSpec
) -> output.AttentionOutput:
  """Computes the op by `forward`, if need be with `col_mass`.

  Raises:
    ValueError: If the type is not a TPU's, or the tiles do not fit into the
      memory of the chip.
  """
  query, key, value, where, sink_logits, row_weights = inputs
  sizes = layout.sizes_of(query, key)
  config = spec.config or Config()
  tiles = plan_lib.tiles_of(config, sizes, where, spec.return_col_mass)
  # Lists of tiles are the only thing that the kernels know of mask or
  # selection.
  rows = lists.by_query(where, sizes, tiles)
  logits = tpu_tile.Logits(float(spec.scale), spec.logits_soft_cap)
  arguments = (config, sizes, tiles)
  plan = plan_lib.forward_plan(*arguments, rows, logits, spec.return_col_mass)
  spans = layout.spans_of(_mask(where), sizes, tiles)
  padded_query, padded_key = _lay_out(query, key, tiles)
  weights = _padded_weights(row_weights, sizes, tiles)
  is_second_pass = plan is None
  if plan is None:
    plan = plan_lib.forward_plan(*arguments, rows, logits, False)
  assert plan is not None
  padded_value = layout.pad_keys(tpu_layout.to_heads(value), 2, tiles)
  operands = padded_query, padded_key, padded_value
  result = tpu_forward.forward(
      *operands, rows, spans, sink_logits, weights, plan
  )
  lse = layout.unpad_queries(result.lse, -1, tiles, sizes.num_queries)
  sums = result.col_mass
  # Where a row of logits does not fit into VMEM, they are made once more.
  if is_second_pass:
    sums = col_mass(inputs, lse, spec)
  elif sums is not None:
    sums = sums[..., : sizes.num_keys]
  out = layout.unpad_queries(result.out, 2, tiles, sizes.num_queries)
  return output.AttentionOutput(tpu_layout.to_heads(out), lse, sums)


def col_mass(
    inputs: differentiable.Inputs,
    lse: Float[Array, "B N T"],
    spec: differentiable.AttentionSpec,
) -> Float[Array, "B N S"]:
  """Sums what each key gets by key tiles, from the lse; errors as `forward`."""
  query, key, _, where, _, row_weights = inputs
  sizes = layout.sizes_of(query, key)
  config = spec.config or Config()
  tiles = plan_lib.tiles_of(config, sizes, where, True)
  columns = lists.by_key(where, sizes, tiles)
  logits = tpu_tile.Logits(float(spec.scale), spec.logits_soft_cap)
  plan = plan_lib.col_mass_plan(config, sizes, tiles, columns, logits)
  weights = None
  if row_weights is not None:
    weights = _padded_weights(row_weights, sizes, tiles)
  sums = tpu_col_mass.col_mass(
      *_lay_out(query, key, tiles),
      columns,
      layout.spans_of(_mask(where), sizes, tiles),
      safe_lse(lse, tiles),
      weights,
      plan,
  )
  return sums[..., : sizes.num_keys]


def backward(
    saved: differentiable.Saved, spec: differentiable.AttentionSpec
) -> differentiable.Cotangents:
  """Computes the cotangents of query, key and value by `backward`."""
  from kernels_pallas.attention.tpu import backward as tpu_backward

  query, key, value, where, lse, delta, d_out = saved
  # Else XLA keeps a second copy of the queries, laid out as here, through the
  # forward pass.
  query, key, value, lse, delta, d_out = jax.lax.optimization_barrier(
      (query, key, value, lse, delta, d_out)
  )
  sizes = layout.sizes_of(query, key)
  tiles = plan_lib.backward_tiles(spec.config or Config(), sizes, where)
  columns = lists.by_key(where, sizes, tiles)
  spans = layout.spans_of(_mask(where), sizes, tiles)
  padded_query, padded_key = _lay_out(query, key, tiles)
  padded_d_out, padded_value = _lay_out(d_out, value, tiles)
  d_query, d_key, d_value = tpu_backward.backward(
      padded_query,
      padded_key,
      padded_value,
      columns,
      (spans.starts, spans.stops),
      spans.query_ids,
      spans.key_ids,
      safe_lse(lse, tiles),
      layout.pad_queries(delta, -1, tiles),
      padded_d_out,
      scale=spec.scale,
      logits_soft_cap=spec.logits_soft_cap,
      block_q=tiles.lanes_q,
      block_kv=tiles.block_kv,
  )
  d_query = layout.unpad_queries(d_query, 2, tiles, sizes.num_queries)
  cotangents = d_query, *(x[:, :, : sizes.num_keys] for x in (d_key, d_value))
  d_query, d_key, d_value = map(tpu_layout.to_heads, cotangents)
  return d_query, d_key, d_value


def safe_lse(
    lse: Float[Array, "B N T"], tiles: layout.Tiles
) -> Float[Array, "B N t"]:
  """Pads with +inf, and puts it where a query has no key: weights become 0."""
  lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse)
  return layout.pad_queries(lse, -1, tiles, fill=jnp.inf)


def _mask(where: differentiable.Where) -> masks.Mask | None:
  return where.mask if isinstance(where, selection_lib.Selection) else where


def _lay_out(
    query: jax.Array, key: jax.Array, tiles: layout.Tiles
) -> tuple[Array, Array]:
  query, key = tpu_layout.to_heads(query), tpu_layout.to_heads(key)
  return (
      layout.pad_queries(query, 2, tiles),
      layout.pad_keys(key, 2, tiles),
  )


def _padded_weights(
    row_weights: jax.Array | None, sizes: layout.Sizes, tiles: layout.Tiles
) -> Array | None:
  """Weights of rows; ones and zeros where only padding has to be left out."""
  num_queries = sizes.num_queries
  is_padded = tiles.lanes_q != tiles.block_q or num_queries % tiles.block_q
  if row_weights is None and not is_padded:
    return None
  if row_weights is None:
    shape = (sizes.batch, sizes.num_heads, num_queries)
    row_weights = jnp.ones(shape, jnp.float32)
  return layout.pad_queries(row_weights, -1, tiles)
