"""What layers' choices of blocks share, lose, and need.

Letters: L layers, B texts, T queries, S keys, N query heads, K key heads, C
blocks, H head size.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

_MASS = 0.9


def overlaps(chosen: Bool[Array, "L B K T C"]) -> Float[Array, "L L K"]:
  """Share of layer j's choice that layer i's has, mean over texts and queries.

  Args:
    chosen: Marks of each layer's choice.
  """
  wide = chosen.astype(jnp.float32)
  same = jnp.einsum("IBKTC,JBKTC->IJBKT", wide, wide)
  size = jnp.maximum(wide.sum(axis=-1), 1)
  return (same / size[None]).mean(axis=(2, 4))


def error(
    weights: Float[Array, "B N T S"],
    chosen: Bool[Array, "B K T C"],
    value: Float[Array, "B S K H"],
    size: int,
) -> Float[Array, ""]:
  """||o' - o|| / ||o|| of the heads' outputs of a layer that reads its choice.

  Args:
    weights: Of the layer.
    chosen: Marks of its choice.
    value: Of all keys.
    size: Keys of a block.
  """
  num_groups = weights.shape[1] // value.shape[2]
  by_key = jnp.repeat(chosen, size, axis=3)[..., : weights.shape[-1]]
  few = jnp.where(jnp.repeat(by_key, num_groups, axis=1), weights, 0.0)
  few = few / jnp.maximum(few.sum(axis=-1, keepdims=True), 1e-9)
  value = jnp.repeat(value, num_groups, axis=2)
  read = lambda weights: jnp.einsum("BNTS,BSNH->BTNH", weights, value)
  norm = lambda x: jnp.sqrt(jnp.square(x).sum())
  return norm(read(few - weights)) / norm(read(weights))


def share(mass: Float[Array, "B K T C"]) -> Float[Array, ""]:
  """Blocks that hold most of the mass, over the blocks that have any."""
  ranked = -jnp.sort(-mass, axis=-1)
  held = ranked / ranked.sum(axis=-1, keepdims=True)
  needed = (jnp.cumsum(held, axis=-1) - held < _MASS).sum(axis=-1)
  return (needed / jnp.maximum((mass > 0).sum(axis=-1), 1)).mean()
