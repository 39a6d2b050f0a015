"""One query a sequence against the keys of a cache, as they lie.

Letters: B batch, N query heads, K key and value heads, G = N / K, C slots of
the cache, H head size.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from joma.transformer import attention
from joma.transformer import hooks
from kernels_pallas import logits


def attend(
    query: Float[Array, "B 1 N H"],
    key: Float[Array, "B K C H"],
    value: Float[Array, "B K C H"],
    is_seen: Bool[Array, "B #K C"],
    options: hooks.AttentionOptions,
) -> tuple[Float[Array, "B 1 N H"], Float[Array, "B K G C"]]:
  """Two products along the cache; returns out, and the attention logits.

  Args:
    query: Rotated.
    key: Rotated.
    value: Of the keys.
    is_seen: The query's keys, at least one.
    options: Its window is the caller's matter: part of `is_seen`.

  Returns:
    out, and the logits, float32: -inf where nothing is seen. `weights` of them
    are the attention weights, computed once.
  """
  batch, _, num_heads, head_dim = query.shape
  grouped = query.reshape(batch, key.shape[1], -1, head_dim)
  products = jnp.einsum(
      "BKGH,BKCH->BKCG",
      grouped.astype(key.dtype),
      key,
      preferred_element_type=jnp.float32,
  )
  # XLA's CPU reads keys once, as rows, if slots stand before heads of a group,
  # and the barrier keeps it from exchanging them.
  products = jax.lax.optimization_barrier(products)
  attn_logits = logits.soft_cap(
      options.scale * products.swapaxes(2, 3), options.logits_soft_cap
  )
  attn_logits = jnp.where(is_seen[:, :, None], attn_logits, -jnp.inf)
  attn_weights = weights(attn_logits, options).astype(value.dtype)
  out = jnp.einsum("BKGC,BKCH->BKGH", attn_weights, value)
  out = out.reshape(batch, 1, num_heads, head_dim).astype(query.dtype)
  return out, attn_logits


def weights(
    attn_logits: Float[Array, "B K G C"], options: hooks.AttentionOptions
) -> Float[Array, "B K G C"]:
  """Softmax of the logits of `attend`, with the heads' sinks."""
  sinks = options.sink_logits
  if sinks is not None:
    sinks = sinks.reshape(*attn_logits.shape[1:3], 1)
  return attention.softmax(attn_logits, sinks)
