"""What block-sparse attention must compute and move.

Pairs are those of the listed tiles: a tile that is partly masked costs as much
as a whole one. Keys and values move once per visit where they do not fit into
fast memory, once in all where they do; the floor below is the latter.
"""

import numpy as np

from kernels_pallas import masks
from kernels_pallas import selection as selection_lib
from kernels_pallas.attention import cost as dense
from kernels_pallas.attention import shapes
from kernels_pallas.attention import visits


def num_pairs(
    where: selection_lib.Selection | masks.Mask | None,
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
  return num_pairs(where, shape, *tiles) / num_pairs(mask, shape, *tiles)


def forward(
    where: selection_lib.Selection,
    shape: shapes.Shape,
    *,
    itemsize: int = 2,
    return_col_mass: bool = False,
) -> dense.Cost:
  """Cost of the forward pass under a known selection."""
  pairs = round(num_pairs(where, shape, where.block_q, where.block_kv))
  return dense.forward(
      shape, pairs, itemsize=itemsize, return_col_mass=return_col_mass
  )


def backward(
    where: selection_lib.Selection, shape: shapes.Shape, *, itemsize: int = 2
) -> dense.Cost:
  """Cost of the fused backward pass under a known selection."""
  pairs = round(num_pairs(where, shape, where.block_q, where.block_kv))
  return dense.backward(shape, pairs, itemsize=itemsize)
