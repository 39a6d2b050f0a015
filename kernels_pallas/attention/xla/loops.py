"""Attention as XLA loops over strips: a block of queries and one head each.

The keys of a strip are gathered tile by tile, so that it costs what the tiles
cost that are listed for it, and no T x S array is made. Tuned for CPUs: few,
large products, and temporaries that stay in the cache.

Letters as in `attention`.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from kernels_pallas import output
from kernels_pallas.attention import differentiable
from kernels_pallas.attention.xla import gather
from kernels_pallas.attention.xla import layout as xla_layout
from kernels_pallas.attention.xla import lists as xla_lists
from kernels_pallas.attention.xla import schedule
from kernels_pallas.attention.xla import strips
from kernels_pallas.hardware import types as hw_types

_CarryT = TypeVar("_CarryT")


def forward(
    inputs: differentiable.Inputs,
    spec: differentiable.AttentionSpec,
    lists: xla_lists.Lists,
    layout: xla_layout.Layout,
) -> output.AttentionOutput:
  """Computes attention over listed tiles, see `differentiable`."""
  query, key, value, _, sink_logits, row_weights = inputs
  dtype = jnp.promote_types(query.dtype, jnp.float32)
  # Scaled once here: queries are [T, H], logits would be T x S.
  queries = layout.split_queries(query.astype(dtype) * spec.scale)
  keys, values = (layout.split_keys(x.astype(dtype)) for x in (key, value))
  sinks = weights = col_mass = None
  if sink_logits is not None:
    sinks = sink_logits.astype(dtype).reshape(layout.num_units, layout.group)
  if spec.return_col_mass:
    weights, col_mass = _columns(row_weights, dtype, layout)

  def compute(strip: gather.Strip, carry: tuple[Any, ...]) -> tuple[Any, ...]:
    outs, lses, col_mass = carry
    out, lse, sums = strips.forward(
        _at(queries, strip.index),
        strip.gather(keys),
        strip.gather(values),
        strip.allowed,
        None if sinks is None else _at(sinks, strip.unit),
        None if weights is None else _at(weights, strip.index),
        spec,
    )
    outs, lses = _put(outs, out, strip.index), _put(lses, lse, strip.index)
    if col_mass is not None and sums is not None:
      col_mass = strip.add_to_columns(col_mass, sums)
    return outs, lses, col_mass

  lses = jnp.zeros(queries.shape[:-1], dtype)
  # Strips are written where they belong: no array of strips is joined.
  outs, lses, col_mass = _run(
      compute, (jnp.zeros_like(queries), lses, col_mass), lists, layout
  )
  out = layout.join_queries(outs)
  out = out if spec.is_out_wide else out.astype(query.dtype)
  lse = layout.join_queries(lses).swapaxes(1, 2)
  if col_mass is not None:
    col_mass = layout.join_columns(col_mass)
  return output.AttentionOutput(out, lse, col_mass)


def backward(
    saved: differentiable.Saved,
    spec: differentiable.AttentionSpec,
    lists: xla_lists.Lists,
    layout: xla_layout.Layout,
) -> differentiable.Cotangents:
  """Computes the cotangents of query, key and value over listed tiles."""
  query, key, value, _, lse, delta, d_out = saved
  dtype = jnp.promote_types(query.dtype, jnp.float32)
  queries = layout.split_queries(query.astype(dtype) * spec.scale)
  keys, values = (layout.split_keys(x.astype(dtype)) for x in (key, value))
  d_outs = layout.split_queries(d_out.astype(dtype))
  # A number each, cut as the queries are.
  lses, deltas = (layout.split_queries(x.swapaxes(1, 2)) for x in (lse, delta))

  def compute(strip: gather.Strip, carry: tuple[Any, ...]) -> tuple[Any, ...]:
    d_queries, d_keys, d_values = carry
    index = strip.index
    d_query, d_key, d_value = strips.backward(
        _at(queries, index),
        strip.gather(keys),
        strip.gather(values),
        strip.allowed,
        _at(lses, index),
        _at(deltas, index),
        _at(d_outs, index),
        spec,
    )
    return (
        _put(d_queries, d_query, index),
        strip.add_to_keys(d_keys, d_key),
        strip.add_to_keys(d_values, d_value),
    )

  # Strips of several heads and queries add to the same keys.
  start = tuple(jnp.zeros_like(x) for x in (queries, keys, values))
  d_queries, d_keys, d_values = _run(compute, start, lists, layout)
  return (
      (layout.join_queries(d_queries) * spec.scale).astype(query.dtype),
      layout.join_keys(d_keys).astype(key.dtype),
      layout.join_keys(d_values).astype(value.dtype),
  )


def col_mass(
    inputs: differentiable.Inputs,
    lse: Float[Array, "B N T"],
    spec: differentiable.AttentionSpec,
    lists: xla_lists.Lists,
    layout: xla_layout.Layout,
) -> Float[Array, "B N S"]:
  """Sums exp(logits - lse) over the queries of listed tiles, in weights."""
  query, key = inputs.query, inputs.key
  dtype = jnp.promote_types(query.dtype, jnp.float32)
  queries = layout.split_queries(query.astype(dtype) * spec.scale)
  keys = layout.split_keys(key.astype(dtype))
  lses = layout.split_queries(lse.swapaxes(1, 2))
  weights, sums = _columns(inputs.row_weights, dtype, layout)

  def compute(strip: gather.Strip, sums: jax.Array) -> jax.Array:
    found = strips.col_mass(
        _at(queries, strip.index),
        strip.gather(keys),
        strip.allowed,
        _at(lses, strip.index),
        _at(weights, strip.index),
        spec,
    )
    return strip.add_to_columns(sums, found)

  return layout.join_columns(_run(compute, sums, lists, layout))


def _columns(
    row_weights: Float[Array, "B N T"] | None,
    dtype: jax.typing.DTypeLike,
    layout: xla_layout.Layout,
) -> tuple[jax.Array, jax.Array]:
  """Weights of rows, cut as queries are, and sums to begin with."""
  if row_weights is None:
    shape = layout.batch_size, layout.num_heads, layout.num_queries
    row_weights = jnp.ones(shape, dtype)
  weights = layout.split_queries(row_weights.astype(dtype).swapaxes(1, 2))
  num_tiles = layout.batch_size * layout.num_units * layout.num_tiles
  size = layout.group * layout.block_kv
  return weights, jnp.zeros((num_tiles, size), dtype)


def _run(
    compute: Callable[..., Any],
    carry: _CarryT,
    lists: xla_lists.Lists,
    layout: xla_layout.Layout,
) -> _CarryT:
  """Applies `compute` to all strips, in loops of equal numbers of tiles."""
  xp = np if isinstance(lists.num_valid, np.ndarray) else jnp
  shape = (layout.batch_size, layout.num_units, layout.num_rows)
  spread = lambda x: xp.broadcast_to(x, shape).reshape(-1)
  # Strips of about as many tiles share a loop, whose body has a fixed width.
  order, loops = schedule.make_loops(
      spread(lists.num_valid),
      spread(lists.is_full),
      lists.table.shape[-1],
  )
  order = jnp.asarray(order)
  for loop in loops:

    def body(
        i: jax.Array, carry: _CarryT, loop: schedule.Loop = loop
    ) -> _CarryT:
      return compute(gather.find(order[i], loop, lists, layout), carry)

    carry = jax.lax.fori_loop(loop.start, loop.stop, body, carry)
  return carry


def _at(x: jax.Array, index: hw_types.Index) -> jax.Array:
  return jax.lax.dynamic_index_in_dim(x, index, keepdims=False)


def _put(x: jax.Array, value: jax.Array, index: hw_types.Index) -> jax.Array:
  return jax.lax.dynamic_update_index_in_dim(x, value, index, 0)
