"""Block-sparse attention by XLA: what CPUs run.

One query block and head at a time, with the key blocks that its row of the
table lists. See `kernels_pallas.attention.xla.loops`.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from kernels_pallas import output
from kernels_pallas import selection
from kernels_pallas.attention import differentiable
from kernels_pallas.attention.xla import layout as xla_layout
from kernels_pallas.attention.xla import lists as xla_lists
from kernels_pallas.attention.xla import loops


def forward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    where: selection.Selection,
    sink_logits: Float[Array, "N"] | None,
    row_weights: Float[Array, "B N T"] | None,
    spec: differentiable.AttentionSpec,
) -> output.AttentionOutput:
  """Computes the op, see `differentiable`."""
  lists, layout = _plan(query, key, where)
  return loops.forward(
      query, key, value, sink_logits, row_weights, spec, lists, layout
  )


def backward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    where: selection.Selection,
    lse: Float[Array, "B N T"],
    delta: Float[Array, "B N T"],
    d_out: Float[Array, "B T N H"],
    spec: differentiable.AttentionSpec,
) -> tuple[Array, Array, Array]:
  """Computes the cotangents of query, key and value, see `differentiable`."""
  lists, layout = _plan(query, key, where)
  return loops.backward(
      query, key, value, lse, delta, d_out, spec, lists, layout
  )


def _plan(
    query: Any, key: Any, where: selection.Selection
) -> tuple[xla_lists.Lists, xla_layout.Layout]:
  batch, num_queries, num_heads = query.shape[:3]
  num_keys, num_kv_heads = key.shape[1:3]
  # Heads that share a key head and a table are computed together.
  is_shared = where.block_table.shape[1] == 1
  layout = xla_layout.Layout(
      batch_size=batch,
      num_queries=num_queries,
      num_keys=num_keys,
      num_heads=num_heads,
      num_kv_heads=num_kv_heads,
      num_units=num_kv_heads if is_shared else num_heads,
      block_q=where.block_q,
      block_kv=where.block_kv,
  )
  is_ragged = num_keys % where.block_kv or num_queries % where.block_q
  is_known = isinstance(where.num_valid, np.ndarray)
  xp = np if is_known else jnp
  lists = xla_lists.Lists(
      table=where.block_table,
      num_valid=where.num_valid,
      is_full=xp.full(
          where.num_valid.shape, where.mask is None and not is_ragged
      ),
      mask=xla_lists.cut(where.mask, layout),
      is_complete=False,
  )
  return lists, layout
