"""Softmax of two levels, over blocks of keys by way of their last one.

Of a query whose own block is o,

  top  = softmax(logits of o's tokens, and of the last key of earlier blocks)
  w_ts = top_s in o,   top_last(b) softmax(logits of b's other keys)_s in b

and last keys themselves have no weight (https://arxiv.org/abs/2305.16300).

Letters: S keys.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas import masks


def weights(
    attn_logits: Float[Array, "*b S"], size: int
) -> Float[Array, "*b S"]:
  """Weights of logits, whole blocks side by side, the query's own last.

  Args:
    attn_logits: -inf where a key is not seen.
    size: Keys of a block, its last one included.
  """
  num_keys = attn_logits.shape[-1]
  if num_keys < size:  # No block is whole yet.
    return _softmax(attn_logits)
  fill = [(0, 0)] * (attn_logits.ndim - 1) + [(0, -num_keys % size)]
  logits = jnp.pad(attn_logits, fill, constant_values=-jnp.inf)
  logits = logits.reshape(*attn_logits.shape[:-1], -1, size)
  block = masks.to_rank(jnp.arange(logits.shape[-2]), logits.ndim - 1)
  is_seen = ~jnp.isneginf(logits).all(axis=-1)
  own = jnp.where(is_seen, block, -1).max(axis=-1, keepdims=True)
  is_own = (block == own)[..., None]
  inner, marks = logits[..., :-1], logits[..., -1:]
  near = jnp.where(is_own, inner, -jnp.inf)
  far = jnp.where(is_own, -jnp.inf, marks)
  top = jnp.concatenate([near, far], axis=-1)
  top = _softmax(top.reshape(*top.shape[:-2], -1)).reshape(top.shape)
  found = top[..., :-1] + top[..., -1:] * _softmax(inner)
  found = jnp.concatenate([found, jnp.zeros_like(marks)], axis=-1)
  return found.reshape(*found.shape[:-2], -1)[..., :num_keys]


def _softmax(logits: Float[Array, "*b S"]) -> Float[Array, "*b S"]:
  """Softmax that is 0, with its gradient, where a row has nothing."""
  is_empty = jnp.isneginf(logits).all(axis=-1, keepdims=True)
  found = jax.nn.softmax(jnp.where(is_empty, 0.0, logits))
  return jnp.where(is_empty, 0.0, found)
