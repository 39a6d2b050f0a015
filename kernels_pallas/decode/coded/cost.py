"""What a step over coded blocks must compute and move: its roofline.

Codes, scales and offsets of all blocks once, keys and values of the newest
block, the query and what comes out.
"""

from kernels_pallas.attention import cost as flash_cost
from kernels_pallas.decode import shapes

Cost = flash_cost.Cost


def attend(
    shape: shapes.Shape, block_size: int = 128, itemsize: int = 2
) -> Cost:
  """Cost of one step.

  Args:
    shape: Sizes; the capacity is that of the blocks, all of them full.
    block_size: R, tokens of a block.
    itemsize: Bytes of a number that is no code.
  """
  heads = shape.batch * shape.num_kv_heads
  num_blocks = shape.capacity // block_size
  # Two codes a byte; a scale and an offset for each channel of keys, and for
  # each token of values.
  block = block_size * shape.head_dim
  block += 2 * itemsize * (shape.head_dim + block_size)
  newest = 2 * block_size * shape.head_dim * itemsize
  vectors = 2 * shape.batch * shape.num_heads * shape.head_dim * itemsize
  seen = shape.capacity + block_size
  pairs = shape.batch * shape.num_heads * seen
  return Cost(
      flops=4 * shape.head_dim * pairs,
      bytes_accessed=heads * (num_blocks * block + newest)
      + vectors
      + 4 * shape.batch,
      transcendentals=pairs,
  )
