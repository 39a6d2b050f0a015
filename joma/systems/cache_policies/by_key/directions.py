"""Lengths and directions of keys.

Letters: B batch, T tokens of a prompt, K key and value heads, G query heads of
each, C slots, H head size.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def norm(x: Float[Array, "*shape H"]) -> Float[Array, "*shape"]:
  """Euclidean lengths, in float32."""
  return jnp.linalg.norm(x.astype(jnp.float32), axis=-1)


def unit(key: Float[Array, "B K C H"]) -> Float[Array, "B K C H"]:
  """Directions of keys; 0 of a key that is 0."""
  key = key.astype(jnp.float32)
  return key / jnp.maximum(norm(key), 1e-12)[..., None]


def cosine_to_mean(
    directions: Float[Array, "B K C H"], is_kept: Bool[Array, "B K C"]
) -> Float[Array, "B K C"]:
  """Cosine of each direction with the mean of the kept ones.

  Args:
    directions: Of length 1, as `unit` gives them.
    is_kept: Slots that count in the mean.
  """
  kept = jnp.where(is_kept[..., None], directions, 0.0)
  mean = kept.sum(axis=2) / jnp.maximum(is_kept.sum(axis=2), 1)[..., None]
  length = jnp.maximum(norm(mean), 1e-12)
  cosine = jnp.einsum("BKCH,BKH->BKC", directions, mean, precision="highest")
  return cosine / length[..., None]
