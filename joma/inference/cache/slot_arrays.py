"""Arrays whose third axis are the slots of a cache: [B, K, C, ...]."""

import jax.numpy as jnp
from jaxtyping import Array, Int


def like(mask: Array, x: Array) -> Array:
  """A mask with axes of one for those of x that it lacks."""
  return mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))


def take(x: Array, index: Int[Array, "B K C"]) -> Array:
  """Picks slots, axis 2."""
  return jnp.take_along_axis(x, like(index, x), axis=2)


def resize(x: Array, capacity: int, fill: float | int = 0) -> Array:
  """Cuts or fills the slots' axis, 2."""
  missing = capacity - x.shape[2]
  if missing <= 0:
    return x[:, :, :capacity]
  widths = [(0, 0)] * x.ndim
  widths[2] = (0, missing)
  return jnp.pad(x, widths, constant_values=fill)


def ranks_of(pos: Int[Array, "B K C"]) -> Int[Array, "B K C"]:
  """Places in the order of positions; -1 where empty."""
  order = jnp.where(pos < 0, jnp.iinfo(jnp.int32).max, pos)
  ranks = jnp.argsort(jnp.argsort(order, axis=-1), axis=-1)
  return jnp.where(pos < 0, -1, ranks).astype(jnp.int32)
