"""Logits of attention as one array: the definition that all readers share.

  logits = soft_cap(scale query key^T),  soft_cap(x) = c tanh(x / c)

Kernels, which never hold the array, are tested against these.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def soft_cap(
    logits: Float[Array, "*shape"], cap: float | None
) -> Float[Array, "*shape"]:
  """Bounds logits by c tanh(logits / c); None leaves them as they are."""
  return logits if cap is None else cap * jnp.tanh(logits / cap)


def attention_logits(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    scale: float,
    logits_soft_cap: float | None,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "B N T S"]:
  """Logits of grouped heads, before any mask.

  Args:
    query: Head n reads key head n // (N / K).
    key: K divides N; never repeated in memory.
    scale: Factor of the products.
    logits_soft_cap: c, None is off.
    dtype: What products add up in, and the result's type.
    precision: Of the products, as `jnp.einsum` takes it.
  """
  batch, num_queries, num_heads, head_dim = query.shape
  num_keys, num_kv_heads = key.shape[1:3]
  # Not -1 for the heads of a group: arrays may be empty.
  groups = (num_kv_heads, num_heads // num_kv_heads)
  grouped = query.reshape(batch, num_queries, *groups, head_dim)
  # The scale comes after the product: queries are not rounded by it.
  logits = scale * jnp.einsum(
      "BTKGH,BSKH->BKGTS",
      grouped,
      key,
      preferred_element_type=dtype,
      precision=precision,
  )
  logits = soft_cap(logits, logits_soft_cap)
  return logits.reshape(batch, num_heads, num_queries, num_keys)
