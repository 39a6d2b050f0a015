"""One query a sequence against the keys of a cache, as they lie.

Letters: B batch, N query heads, K key and value heads, G = N / K, C slots of
the cache, H head size.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from joma.transformer import hooks
from joma.transformer.weighing import rule as rules
from kernels_pallas import logits


def attend(
    query: Float[Array, "B 1 N H"],
    key: Float[Array, "B K C H"],
    value: Float[Array, "B K C H"],
    is_seen: Bool[Array, "B #K C"],
    options: hooks.AttentionOptions,
    bias: Float[Array, "B K G C"] | None = None,
) -> tuple[Float[Array, "B 1 N H"], Float[Array, "B K G C"]]:
  """Two products along the cache; returns out, and the attention logits.

  Args:
    query: Rotated.
    key: Rotated.
    value: Of the keys.
    is_seen: The query's keys, at least one.
    options: Its window is the caller's matter: part of `is_seen`.
    bias: Added to the logits, of a rule that has one.

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
  if bias is not None:
    attn_logits = attn_logits + bias
  attn_logits = jnp.where(is_seen[:, :, None], attn_logits, -jnp.inf)
  found, rest = _weights(attn_logits, query, options)
  out = jnp.einsum("BKGC,BKCH->BKGH", found.astype(value.dtype), value)
  extra = rules.extra_values(options.weights, value.swapaxes(1, 2))
  if extra is not None and rest is not None:
    out += jnp.einsum("BKGE,BEKH->BKGH", rest.astype(value.dtype), extra)
  out = out.reshape(batch, 1, num_heads, head_dim).astype(query.dtype)
  return out, attn_logits


def weights(
    attn_logits: Float[Array, "B K G C"],
    query: Float[Array, "B 1 N H"],
    options: hooks.AttentionOptions,
) -> Float[Array, "B K G C"]:
  """Weights of the logits of `attend` by the rule of the options."""
  return _weights(attn_logits, query, options)[0]


def _weights(
    attn_logits: Float[Array, "B K G C"],
    query: Float[Array, "B 1 N H"],
    options: hooks.AttentionOptions,
) -> tuple[Float[Array, "B K G C"], Float[Array, "B K G E"] | None]:
  rule = options.weights
  rest = rules.rest_logits(rule, query, options.scale, options.logits_soft_cap)
  if rest is not None:
    rest = rest.reshape(len(rest), *attn_logits.shape[1:3], -1)
  return rules.weights(attn_logits, rule, rest)
