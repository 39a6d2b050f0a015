"""A penalty on whole blocks of neurons, so that some of them go.

  penalty = sum over layers and blocks u of
            sqrt(||W_up[:, u]||^2 + ||W_gate[:, u]||^2 + ||W_down[u]||^2)

the L2,1 norm of blocks of neurons. Unlike weight decay it pulls small blocks as
hard as large ones: what is sparse is then what hardware can skip.

Letters: U blocks of a layer.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from joma.transformer.layers import scanning


def block_norms(params: PyTree, size: int) -> dict[str, Float[Array, "U"]]:
  """Returns the norm of each block, by the layer's name.

  Args:
    params: A Transformer's.
    size: Neurons of a block; divides those of a layer.
  """
  found = {}
  for name, layer in scanning.unstack(params).items():
    if not name.startswith("layers_"):
      continue
    mlp = layer["mlp"]
    squares = jnp.square(mlp["down"]["kernel"]).sum(axis=1)
    for part in ("up", "gate"):
      if part in mlp:
        squares += jnp.square(mlp[part]["kernel"]).sum(axis=0)
    squares = squares.reshape(-1, size).sum(axis=1)
    # The root has no gradient at 0, where a block that is gone stays.
    is_there = squares > 0
    roots = jnp.sqrt(jnp.where(is_there, squares, 1.0))
    found[name] = jnp.where(is_there, roots, 0.0)
  return found


def penalty(params: PyTree, size: int) -> Float[Array, ""]:
  """Sum of all blocks' norms."""
  norms = [norms.sum() for norms in block_norms(params, size).values()]
  return jax.tree.reduce(jnp.add, norms, jnp.zeros(()))
