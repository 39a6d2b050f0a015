"""Products of two-dimensional arrays, for XLA and the TPU kernels alike."""

import dataclasses

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas import interpret


@dataclasses.dataclass(frozen=True)
class Products:
  """Products whose operands are rounded to `dtype` and whose sums are not.

  Attributes:
    dtype: Type of operands; float32 and float64 are exact to themselves.
    in_kernel: Whether sums of rows go over rolled rows, in the registers of a
      kernel. XLA would make each link of such a chain again wherever it is
      used: there they are products with ones.
  """

  dtype: jax.typing.DTypeLike
  in_kernel: bool = False

  def __call__(
      self,
      x: Float[Array, "_ _"],
      y: Float[Array, "_ _"],
      over: tuple[int, int] = (1, 0),
  ) -> Float[Array, "_ _"]:
    """Of x and y, summed over axis `over[0]` of x and `over[1]` of y."""
    return exact(x.astype(self.dtype), y.astype(self.dtype), over)

  def fine(
      self,
      x: Float[Array, "_ _"],
      y: Float[Array, "_ _"],
      over: tuple[int, int] = (1, 0),
  ) -> Float[Array, "_ _"]:
    """The same, where rounding would be felt in later products.

    Of a type with fewer bits than the sums, operands are the sum of two.
    """
    if self.dtype == x.dtype:
      return exact(x, y, over)
    (x, less_x), (y, less_y) = (self._halves(z) for z in (x, y))
    found = exact(x, y, over)
    return found + (exact(x, less_y, over) + exact(less_x, y, over))

  def sums_until(self, x: Float[Array, "m n"]) -> Float[Array, "m n"]:
    """Sums of the rows up to each; m a power of 2."""
    rows, columns = positions(x.shape[0])
    if not self.in_kernel:
      return sums_of(columns <= rows, x)
    row = rows_of(x.shape)
    for bit in range(x.shape[0].bit_length() - 1):
      size = 1 << bit
      x = x + jnp.where(row >= size, jnp.roll(x, size, 0), 0)
    return x

  def sums_from(self, x: Float[Array, "m n"]) -> Float[Array, "m n"]:
    """Sums of the rows from each on."""
    rows, columns = positions(x.shape[0])
    if not self.in_kernel:
      return sums_of(columns >= rows, x)
    row, count = rows_of(x.shape), x.shape[0]
    for bit in range(count.bit_length() - 1):
      size = 1 << bit
      x = x + jnp.where(row < count - size, jnp.roll(x, -size, 0), 0)
    return x

  def _halves(self, x: Float[Array, "m n"]) -> list[Float[Array, "m n"]]:
    much = x.astype(self.dtype)
    return [much, (x - much.astype(x.dtype)).astype(self.dtype)]


def exact(
    x: Float[Array, "_ _"],
    y: Float[Array, "_ _"],
    over: tuple[int, int] = (1, 0),
) -> Float[Array, "_ _"]:
  """Of what is given, without rounding before the sums."""
  sums = jnp.promote_types(x.dtype, jnp.float32)
  if interpret.mode():  # XLA's CPU has not all products of bfloat16.
    x, y = x.astype(sums), y.astype(sums)
  # Else a matrix unit would round float32 to bfloat16.
  precision = lax.Precision.HIGHEST if x.dtype == sums else None
  dimensions = (((over[0],), (over[1],)), ((), ()))
  return lax.dot_general(
      x, y, dimensions, precision, preferred_element_type=sums
  )


def positions(chunk: int) -> tuple[Int[Array, "m m"], Int[Array, "m m"]]:
  """Rows and columns of a square."""
  rows, columns = (
      lax.broadcasted_iota(jnp.int32, (chunk, chunk), i) for i in (0, 1)
  )
  return rows, columns


def rows_of(shape: tuple[int, ...]) -> Int[Array, "m n"]:
  """The row of each element."""
  return lax.broadcasted_iota(jnp.int32, shape, 0)


def differ(
    rows: Int[Array, "m m"], columns: Int[Array, "m m"], bit: int
) -> Bool[Array, "m m"]:
  """Whether the row is later, and `bit` the highest in which they differ."""
  return ((rows ^ columns) >> bit == 1) & (rows > columns)


def to_column(row: Float[Array, "1 m"]) -> Float[Array, "m 1"]:
  """The transposed, which a TPU has of whole tiles alone."""
  rows, columns = positions(row.shape[1])
  return jnp.where(rows == columns, row, 0).sum(axis=1, keepdims=True)


def to_row(column: Float[Array, "m 1"]) -> Float[Array, "1 m"]:
  """The transposed."""
  rows, columns = positions(column.shape[0])
  return jnp.where(rows == columns, column, 0).sum(axis=0, keepdims=True)


def sums_of(
    taken: Bool[Array, "l m"], x: Float[Array, "m n"]
) -> Float[Array, "l n"]:
  """Sums of the rows that are taken."""
  return exact(jnp.where(taken, 1, 0).astype(x.dtype), x)
