"""What attention must compute and move: the roofline of the op.

FLOPs of a pair of query and key: 2 H for its logit and 2 H for its value; the
backward has five products of that size where the forward has two. HBM bytes are
the floor: every array once, which a kernel reaches whose keys and values fit
into fast memory; where they do not fit, they move once a visit.
"""

import dataclasses
import math

import numpy as np

from kernels_pallas import masks
from kernels_pallas import selection as selection_lib
from kernels_pallas.attention import differentiable
from kernels_pallas.attention import shapes
from kernels_pallas.attention import visits


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


def num_pairs(where: differentiable.Where, shape: shapes.Shape) -> int:
  """Pairs of query and key that are computed, a query head, over the batch.

  Args:
    where: Known. Of a mask, the pairs that it allows; ids are not counted: they
      only forbid, so that this is an upper bound. Of a selection, those of the
      listed tiles, heads averaged: a partly masked tile costs as a whole one.
    shape: Sizes.
  """
  if where is None:
    return shape.batch * shape.num_queries * shape.num_keys
  if isinstance(where, selection_lib.Selection):
    return round(tile_pairs(where, shape, where.block_q, where.block_kv))
  lengths = (where.stops - where.starts).clip(min=0)
  # A mask without a batch counts once for each sequence.
  repeats = 1 if lengths.ndim == 3 and len(lengths) > 1 else shape.batch
  return int(lengths.sum()) * repeats


def tile_pairs(
    where: differentiable.Where,
    shape: shapes.Shape,
    block_q: int,
    block_kv: int,
) -> float:
  """Pairs in visited tiles, a query head, over the batch; heads averaged."""
  sizes = (shape.num_queries, shape.num_keys, block_q, block_kv)
  states = np.asarray(visits.states_of(where, *sizes))
  visited = (states > selection_lib.EMPTY).sum(axis=(-1, -2)).mean()
  return float(visited) * shape.batch * block_q * block_kv


def density(
    where: selection_lib.Selection,
    shape: shapes.Shape,
    mask: masks.Mask | None = None,
) -> float:
  """Visited tiles as a fraction of those of dense attention under `mask`."""
  tiles = (where.block_q, where.block_kv)
  return tile_pairs(where, shape, *tiles) / tile_pairs(mask, shape, *tiles)


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


def _sizes(shape: shapes.Shape) -> tuple[int, int, int]:
  """Elements of query, key and value."""
  query, key, value = (math.prod(array.shape) for array in shape.arrays())
  return query, key, value
