"""Block-sparse attention in plain jnp with the whole T x S mask: the contract.

A key is allowed where the query block's table lists its block and the
selection's mask holds; the rest is `flash_attention.reference`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels_pallas import masks
from kernels_pallas import output
from kernels_pallas import selection
from kernels_pallas.attention import differentiable
from kernels_pallas.attention import reference


def forward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    where: selection.Selection,
    sink_logits: Float[Array, "N"] | None,
    row_weights: Float[Array, "B N T"] | None,
    spec: differentiable.AttentionSpec,
) -> output.AttentionOutput:
  """Computes the op; differentiable by jax itself."""
  allowed = allowed_pairs(where, query.shape[1], key.shape[1])
  return reference.attend_where(
      query, key, value, allowed, sink_logits, row_weights, spec
  )


def allowed_pairs(
    where: selection.Selection, num_queries: int, num_keys: int
) -> Bool[Array, "#B #N T S"]:
  """The selection as a dense mask."""
  table = jnp.asarray(where.block_table)
  entry = masks.to_rank(jnp.arange(table.shape[-1]), table.ndim)
  is_valid = entry < where.num_valid[..., None]
  blocks = jnp.arange(-(-num_keys // where.block_kv))
  blocks = masks.to_rank(blocks, table.ndim + 1)
  listed = ((table[..., None] == blocks) & is_valid[..., None]).any(axis=-2)
  by_query = jnp.repeat(listed, where.block_q, axis=2)[:, :, :num_queries]
  chosen = jnp.repeat(by_query, where.block_kv, axis=3)[..., :num_keys]
  if where.mask is None:
    return chosen
  allowed = jnp.asarray(masks.allowed(where.mask, num_keys))
  allowed = allowed[:, None] if allowed.ndim == 3 else allowed[None, None]
  return chosen & allowed
