"""What attention must compute and move: the roofline of the op.

FLOPs of a pair of query and key: 2 H for its logit and 2 H for its value; the
backward has five products of that size where the forward has two. HBM bytes are
the floor: every array once, which a kernel reaches whose keys and values fit
into fast memory.
"""

import dataclasses
import math
from typing import Any

from kernels_pallas import masks
from kernels_pallas.attention import shapes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
  """Work of one call.

  Attributes:
    flops: Multiplications and additions of the matrix products.
    bytes_accessed: Bytes read from and written to HBM.
    transcendentals: Exponentials.
  """

  flops: int
  bytes_accessed: int
  transcendentals: int

  def seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
    """Roofline time: the slower of arithmetic and memory."""
    return max(self.flops / flops_per_s, self.bytes_accessed / bytes_per_s)


def num_pairs(mask: masks.Mask | None, shape: shapes.Shape) -> int:
  """Pairs of query and key that a known mask allows, over the batch.

  Ids are not counted: they only forbid, so that this is an upper bound.
  """
  if mask is None:
    return shape.batch * shape.num_queries * shape.num_keys
  lengths = (mask.stops - mask.starts).clip(min=0)
  repeats = 1 if lengths.ndim == 3 and len(lengths) > 1 else shape.batch
  return int(lengths.sum()) * repeats


def forward(
    shape: shapes.Shape,
    pairs: int,
    *,
    itemsize: int = 2,
    return_col_mass: bool = False,
) -> Cost:
  """Cost of the forward pass.

  Args:
    shape: Sizes.
    pairs: Pairs of query and key that are computed, per query head.
    itemsize: Bytes of a query element.
    return_col_mass: Whether column sums are written; exact ones need no further
      product if the logits of a row of tiles stay in fast memory.
  """
  query, key, value = _sizes(shape)
  statistics = shape.batch * shape.num_heads * shape.num_queries
  if return_col_mass:
    statistics += shape.batch * shape.num_heads * shape.num_keys
  return Cost(
      flops=4 * shape.head_dim * pairs * shape.num_heads,
      bytes_accessed=itemsize * (2 * query + key + value) + 4 * statistics,
      transcendentals=pairs * shape.num_heads,
  )


def backward(shape: shapes.Shape, pairs: int, *, itemsize: int = 2) -> Cost:
  """Cost of the fused backward pass, from lse and delta."""
  query, key, value = _sizes(shape)
  statistics = 2 * shape.batch * shape.num_heads * shape.num_queries
  return Cost(
      flops=10 * shape.head_dim * pairs * shape.num_heads,
      bytes_accessed=itemsize * (3 * query + 2 * (key + value))
      + 4 * statistics,
      transcendentals=pairs * shape.num_heads,
  )


def _sizes(shape: shapes.Shape) -> Any:
  """Elements of query, key and value."""
  return (math.prod(array.shape) for array in shape.arrays())
