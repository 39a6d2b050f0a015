"""What a decode step must compute and move: the roofline of the op.

A slot costs a query head 2 H for its logit and 2 H for its value. HBM bytes are
the floor: keys, values, scores and positions of the cache once, the scores once
more to be written, the positions of new tokens and one row of each head, and
the vectors of the new tokens.
"""

from kernels_pallas.attention import cost as flash_cost
from kernels_pallas.decode import shapes

Cost = flash_cost.Cost


def step(
    shape: shapes.Shape, *, itemsize: int = 2, cache_itemsize: int | None = None
) -> Cost:
  """Cost of one step.

  Args:
    shape: Sizes.
    itemsize: Bytes of an element of query, key, value and out.
    cache_itemsize: Bytes of a stored element; None is `itemsize`. 1 comes with
      a float32 for each key and each value.
  """
  stored = cache_itemsize or itemsize
  heads = shape.batch * shape.num_kv_heads
  # int8 comes with a scale of four bytes a row.
  row = stored * shape.head_dim + (4 if stored == 1 else 0)
  pairs = shape.batch * shape.num_heads * shape.capacity
  # Read: key, value, score, pos. Written: score.
  cache = heads * shape.capacity * (2 * row + 4 + 4 + 4)
  vectors = 2 * shape.batch * (shape.num_heads + shape.num_kv_heads)
  return Cost(
      flops=4 * shape.head_dim * pairs,
      # A new row for each head, its position, and the slot that it took.
      bytes_accessed=cache
      + heads * (2 * row + 4 + 4)
      + vectors * shape.head_dim * itemsize
      + 4 * shape.batch,
      transcendentals=pairs,
  )
