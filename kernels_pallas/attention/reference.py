"""Attention in plain jnp with the whole T x S array: the contract of the op.

  logits = soft_cap(scale query key^T),  -inf where the mask forbids
  lse    = log(sum_s exp(logits) + exp(sink))
  out    = sum_s exp(logits - lse) value_s
  col_mass_s = sum_t row_weights_t exp(logits_ts - lse_t)

Rows without any key give out = 0, lse = -inf (or the sink) and no gradient.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels_pallas import masks
from kernels_pallas import output
from kernels_pallas.attention import differentiable


def forward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    where: masks.Mask | None,
    sink_logits: Float[Array, "N"] | None,
    row_weights: Float[Array, "B N T"] | None,
    spec: differentiable.AttentionSpec,
) -> output.AttentionOutput:
  """Computes the op; differentiable by jax itself."""
  allowed = None
  if where is not None:
    allowed = jnp.asarray(masks.allowed(where, key.shape[1]))
    allowed = allowed[:, None] if allowed.ndim == 3 else allowed[None, None]
  return attend_where(
      query, key, value, allowed, sink_logits, row_weights, spec
  )


def attend_where(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    allowed: Bool[Array, "#B #N T S"] | None,
    sink_logits: Float[Array, "N"] | None,
    row_weights: Float[Array, "B N T"] | None,
    spec: differentiable.AttentionSpec,
) -> output.AttentionOutput:
  """Attention under a dense mask, which may differ between heads."""
  num_groups = query.shape[2] // key.shape[2]
  dtype = jnp.promote_types(query.dtype, jnp.float32)
  key, value = (jnp.repeat(x, num_groups, axis=2) for x in (key, value))
  attn_logits = spec.scale * jnp.einsum(
      "BTNH,BSNH->BNTS",
      query,
      key,
      preferred_element_type=dtype,
      precision="highest",
  )
  if spec.logits_soft_cap is not None:
    cap = spec.logits_soft_cap
    attn_logits = cap * jnp.tanh(attn_logits / cap)
  if allowed is not None:
    attn_logits = jnp.where(allowed, attn_logits, -jnp.inf)
  lse = _log_sum_exp(attn_logits, sink_logits)
  # Where no key is allowed, exp(-inf - 0) = 0 instead of exp(-inf + inf).
  safe_lse = jnp.where(jnp.isneginf(lse), 0.0, lse)
  attn_weights = jnp.exp(attn_logits - safe_lse[..., None])
  out = jnp.einsum(
      "BNTS,BSNH->BTNH", attn_weights, value.astype(dtype), precision="highest"
  )
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


def _log_sum_exp(
    attn_logits: Float[Array, "B N T S"], sink_logits: Float[Array, "N"] | None
) -> Float[Array, "B N T"]:
  """-inf for rows without a finite logit, with gradient 0 there."""
  if sink_logits is not None:
    sink = sink_logits.astype(attn_logits.dtype)[None, :, None, None]
    sink = jnp.broadcast_to(sink, (*attn_logits.shape[:3], 1))
    attn_logits = jnp.concatenate([attn_logits, sink], axis=-1)
  highest = attn_logits.max(axis=-1, keepdims=True, initial=-jnp.inf)
  highest = jax.lax.stop_gradient(
      jnp.where(jnp.isneginf(highest), 0.0, highest)
  )
  total = jnp.exp(attn_logits - highest).sum(axis=-1)
  has_key = total > 0
  log = jnp.log(jnp.where(has_key, total, 1.0)) + highest[..., 0]
  return jnp.where(has_key, log, -jnp.inf)
