"""Inverses of unit lower triangular matrices, by products alone.

Of a block [[X, 0], [L, Y]] with X and Y inverted, the inverse below the
diagonal is -Y^-1 L X^-1: blocks of one row are 1, and each round doubles them.
Nothing on the way is larger than in the inverse itself. Powers of L, whose sum
it also is, may be, and cancel: with repeated keys and beta 1 they reach 10^18
within 64 positions.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.gated_delta_rule.algebra import products


def of_unit_lower(
    lower: Float[Array, "C C"], product: products.Products
) -> Float[Array, "C C"]:
  """(1 + lower)^-1, of a strictly lower triangular matrix; C a power of 2."""
  rows, columns = products.positions(lower.shape[0])
  found = jnp.where(rows == columns, 1, 0).astype(lower.dtype)
  for bit in range(lower.shape[0].bit_length() - 1):
    part = jnp.where(products.differ(rows, columns, bit), lower, 0)
    if bit:
      part = product.fine(product.fine(found, part), found)
    found = found - part
  return found


class Solver:
  """The inverse, made once for all of its products; see `chunk.Solver`."""

  def __init__(self, lower: Float[Array, "C C"], product: products.Products):
    self._product = product
    self._inverse = of_unit_lower(lower, product)

  def __call__(
      self, right: Float[Array, "C J"], *, is_transposed: bool = False
  ) -> Float[Array, "C J"]:
    """Solves, see `chunk.Solver`."""
    return self._product.fine(self._inverse, right, (int(not is_transposed), 0))
