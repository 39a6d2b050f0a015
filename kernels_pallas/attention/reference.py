"""Attention in plain jnp with the whole T x S array: the contract of the op.

  logits = soft_cap(scale query key^T),  -inf where `where` forbids
  lse    = log(sum_s exp(logits) + exp(sink))
  out    = sum_s exp(logits - lse) value_s
  col_mass_s = sum_t row_weights_t exp(logits_ts - lse_t)

Rows without any key give out = 0, lse = -inf (or the sink) and no gradient.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels_pallas import logits as logits_lib
from kernels_pallas import masks
from kernels_pallas import output
from kernels_pallas import selection as selection_lib
from kernels_pallas.attention import differentiable


def forward(
    inputs: differentiable.Inputs, spec: differentiable.AttentionSpec
) -> output.AttentionOutput:
  """Computes the op; differentiable by jax itself."""
  query, key, value, where, sink_logits, row_weights = inputs
  dtype = jnp.promote_types(query.dtype, jnp.float32)
  attn_logits = logits_lib.attention_logits(
      query,
      key,
      spec.scale,
      spec.logits_soft_cap,
      dtype=dtype,
      precision="highest",
  )
  if where is not None:
    allowed = allowed_pairs(where, query.shape[1], key.shape[1])
    attn_logits = jnp.where(allowed, attn_logits, -jnp.inf)
  lse = _log_sum_exp(attn_logits, sink_logits)
  # Where no key is allowed, exp(-inf - 0) = 0 instead of exp(-inf + inf).
  safe_lse = jnp.where(jnp.isneginf(lse), 0.0, lse)
  attn_weights = jnp.exp(attn_logits - safe_lse[..., None])
  # The contract may repeat values; implementations never do.
  num_groups = query.shape[2] // key.shape[2]
  values = jnp.repeat(value, num_groups, axis=2).astype(dtype)
  out = jnp.einsum("BNTS,BSNH->BTNH", attn_weights, values, precision="highest")
  col_mass = None
  if spec.return_col_mass:
    rows = jnp.ones_like(lse) if row_weights is None else row_weights
    col_mass = jnp.einsum(
        "BNTS,BNT->BNS",
        jax.lax.stop_gradient(attn_weights),
        rows.astype(dtype),
        precision="highest",
    )
  return output.AttentionOutput(out.astype(query.dtype), lse, col_mass)


def allowed_pairs(
    where: masks.Mask | selection_lib.Selection,
    num_queries: int,
    num_keys: int,
) -> Bool[Array, "#B #N T S"]:
  """True where a query may attend to a key, as one array.

  Args:
    where: Of a selection, a key is allowed where the row of the query's block
      lists the key's block and the selection's mask holds.
    num_queries: T.
    num_keys: S.
  """
  if isinstance(where, masks.Mask):
    allowed = jnp.asarray(masks.allowed(where, num_keys))
    return allowed[:, None] if allowed.ndim == 3 else allowed[None, None]
  chosen = _listed_pairs(where, num_queries, num_keys)
  if where.mask is None:
    return chosen
  return chosen & allowed_pairs(where.mask, num_queries, num_keys)


def _listed_pairs(
    where: selection_lib.Selection, num_queries: int, num_keys: int
) -> Bool[Array, "#B #N T S"]:
  """True where the query's block lists the key's block."""
  table = jnp.asarray(where.block_table)
  entry = masks.to_rank(jnp.arange(table.shape[-1]), table.ndim)
  is_valid = entry < where.num_valid[..., None]
  blocks = jnp.arange(-(-num_keys // where.block_kv))
  blocks = masks.to_rank(blocks, table.ndim + 1)
  listed = ((table[..., None] == blocks) & is_valid[..., None]).any(axis=-2)
  by_query = jnp.repeat(listed, where.block_q, axis=2)[:, :, :num_queries]
  return jnp.repeat(by_query, where.block_kv, axis=3)[..., :num_keys]


def _log_sum_exp(
    attn_logits: Float[Array, "B N T S"], sink_logits: Float[Array, "N"] | None
) -> Float[Array, "B N T"]:
  """-inf for rows without a finite logit, with gradient 0 there."""
  if sink_logits is not None:
    sink = sink_logits.astype(attn_logits.dtype)[None, :, None, None]
    sink = jnp.broadcast_to(sink, (*attn_logits.shape[:3], 1))
    attn_logits = jnp.concatenate([attn_logits, sink], axis=-1)
  # `initial` for rows of no key at all, S = 0.
  highest = attn_logits.max(axis=-1, keepdims=True, initial=-jnp.inf)
  highest = jax.lax.stop_gradient(
      jnp.where(jnp.isneginf(highest), 0.0, highest)
  )
  total = jnp.exp(attn_logits - highest).sum(axis=-1)
  has_key = total > 0
  log = jnp.log(jnp.where(has_key, total, 1.0)) + highest[..., 0]
  return jnp.where(has_key, log, -jnp.inf)
