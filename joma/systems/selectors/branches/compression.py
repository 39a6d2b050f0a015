"""How a block of keys, or of values, becomes one.

Letters: B batch, S keys, K key and value heads, H head size, C blocks, U keys
of a block, R hidden units.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Parameters of an MLP, by which blocks are compressed.
PARTS = ("place", "in", "out")


def draw(key: Array, block: int, size: int, hidden: int) -> dict[str, Array]:
  """Draws places [U, H], and weights [U H, R] and [R, H].

  Args:
    key: Random key.
    block: U.
    size: H.
    hidden: R.
  """
  keys = jax.random.split(key, 3)
  shapes = ((block, size), (block * size, hidden), (hidden, size))
  place, *weights = (
      shape[0] ** -0.5 * jax.random.normal(one, shape)
      for one, shape in zip(keys, shapes, strict=True)
  )
  return dict(zip(PARTS, (0.1 * place, *weights), strict=True))


def by_mlp(
    params: Mapping[str, Array], blocks: Float[Array, "B C U K H"]
) -> Float[Array, "B C K H"]:
  """gelu((block + places) W_in) W_out, one vector a block and head."""
  place = params["place"][None, None, :, None]
  placed = jnp.moveaxis(blocks + place.astype(blocks.dtype), 3, 2)
  flat = placed.reshape(*placed.shape[:3], -1)
  product = lambda x, name: jnp.einsum(
      "BCKI,IJ->BCKJ", x, params[name].astype(x.dtype)
  )
  return product(jax.nn.gelu(product(flat, "in")), "out")


def in_blocks(
    x: Float[Array, "B S K H"], size: int
) -> Float[Array, "B C U K H"]:
  """Zeros fill the last block, which nobody reads compressed."""
  x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), (0, 0), (0, 0)))
  return x.reshape(len(x), -1, size, *x.shape[2:])
