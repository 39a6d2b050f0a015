"""Products with weights as products of matrices, which compilers do best.

A product of [B, T, D] by a kernel [D, F] has the kernel's gradient sum over two
axes, and XLA then turns the larger of its operands on a CPU, number by number,
computing what that came from once more on the way. Of rows [B T, D] it turns
the smaller one. On a mesh, where B and T are split, axes stay as they are.
"""

import math
from typing import Any

import jax
from jaxtyping import Array, Float

from joma.transformer import sharding

# Axes that are contracted, of either side; none is shared.
_Numbers = tuple[tuple[Any, Any], tuple[Any, Any]]


def dot_general(
    x: Float[Array, "..."],
    kernel: Float[Array, "..."],
    dimension_numbers: _Numbers,
    precision: jax.lax.PrecisionLike = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
) -> Float[Array, "..."]:
  """As `jax.lax.dot_general` of the last axes of x by the first of a kernel.

  What contracts other axes is handed on as it is.

  Args:
    x: What a layer reads.
    kernel: Its weights.
    dimension_numbers: As there.
    precision: As there.
    preferred_element_type: As there.
  """
  options: dict[str, Any] = dict(
      precision=precision, preferred_element_type=preferred_element_type
  )
  num_axes = len(dimension_numbers[0][0])
  last = tuple(range(x.ndim - num_axes, x.ndim)), tuple(range(num_axes))
  contracted = tuple(tuple(axes) for axes in dimension_numbers[0])
  is_plain = contracted == last and not any(dimension_numbers[1])
  if not is_plain or sharding.current_mesh() is not None:
    return jax.lax.dot_general(x, kernel, dimension_numbers, **options)
  outer, inner = x.shape[: x.ndim - num_axes], x.shape[x.ndim - num_axes :]
  rows = x.reshape(math.prod(outer), math.prod(inner))
  matrix = kernel.reshape(math.prod(inner), -1)
  out = jax.lax.dot_general(rows, matrix, (((1,), (0,)), ((), ())), **options)
  return out.reshape(*outer, *kernel.shape[num_axes:])
