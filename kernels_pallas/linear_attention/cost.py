"""What linear attention must compute and move: the roofline of the op.

A chunk of C positions costs a head four products: C x C x H for the weights,
the same for their values, and C x H x H each to read the state and to add to
it. A pair of positions within a chunk is counted whether it is causal or not,
as the products are made. HBM bytes are the floor: every array once.
"""

from kernels_pallas.attention import cost as flash_cost
from kernels_pallas.linear_attention import shapes

Cost = flash_cost.Cost


def sweep(
    shape: shapes.Shape,
    chunk: int,
    *,
    itemsize: int = 2,
    out_itemsize: int | None = None,
    num_shared: int = 2,
) -> Cost:
  """Cost of one sweep over the sequence.

  Args:
    shape: Sizes; its length is rounded up to whole chunks.
    chunk: C.
    itemsize: Bytes of an element of query, key and value.
    out_itemsize: Bytes of an element of out; None is `itemsize`.
    num_shared: How many of query, key and value have only K heads.
  """
  heads = shape.batch * shape.num_heads
  rows = -(-shape.length // chunk) * chunk
  row = shape.batch * shape.length * shape.head_dim
  elements = row * (
      num_shared * shape.num_kv_heads + (3 - num_shared) * shape.num_heads
  )
  out = row * shape.num_heads * (out_itemsize or itemsize)
  states = 2 * 4 * heads * shape.head_dim**2
  return Cost(
      flops=4 * heads * rows * shape.head_dim * (chunk + shape.head_dim),
      bytes_accessed=itemsize * elements + out + states,
      # The weights once a head, and two factors a position.
      transcendentals=heads * (chunk**2 + 2 * rows),
  )


def forward(shape: shapes.Shape, chunk: int, *, itemsize: int = 2) -> Cost:
  """Cost of the forward pass."""
  return sweep(shape, chunk, itemsize=itemsize)


def backward(shape: shapes.Shape, chunk: int, *, itemsize: int = 2) -> Cost:
  """Cost of the backward pass by query, key, value and the initial state.

  Three sweeps; where query heads share a key head, two of them write float32.
  """
  # Gradients of shared keys are added over query heads, which needs float32.
  is_grouped = shape.num_kv_heads < shape.num_heads
  wide = 4 if is_grouped else itemsize
  parts = (
      sweep(shape, chunk, itemsize=itemsize),
      *2
      * (
          sweep(
              shape,
              chunk,
              itemsize=itemsize,
              out_itemsize=wide,
              num_shared=1,
          ),
      ),
  )
  return Cost(
      flops=sum(x.flops for x in parts),
      bytes_accessed=sum(x.bytes_accessed for x in parts),
      transcendentals=sum(x.transcendentals for x in parts),
  )


def step(shape: shapes.Shape, *, itemsize: int = 2) -> Cost:
  """Cost of one decode step: `shape.length` does not count."""
  heads = shape.batch * shape.num_heads
  vectors = shape.batch * (2 * shape.num_heads + 2 * shape.num_kv_heads)
  return Cost(
      # Decay, outer product and its sum, then query times state.
      flops=5 * heads * shape.head_dim**2,
      bytes_accessed=2 * 4 * heads * shape.head_dim**2
      + vectors * shape.head_dim * itemsize,
      transcendentals=0,
  )
