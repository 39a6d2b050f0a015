"""What the gated delta rule must compute and move: the roofline of the op.

Of a chunk of C positions a head has products of C x H x J with its state, of
C x C x H for its pairs and of C x C x J with them; a pair is counted whether it
is causal or not, as the products are made. With a decay a key channel, the
products for pairs are made once for each bit of a position, see
`algebra.fading`. The triangular system is counted as its inverse by products,
see `algebra.inverse`. Sums of logarithms are left out. HBM bytes are the floor:
every array once.
"""

import dataclasses

from kernels_pallas.attention import cost as flash_cost
from kernels_pallas.gated_delta_rule import shapes

Cost = flash_cost.Cost


@dataclasses.dataclass(frozen=True)
class _Products:
  """How many products of each kind a chunk of a head has.

  Attributes:
    states: Of C x H x J.
    pairs: Of C x C x H, a bit if decays are by channel.
    values: Of C x C x J.
  """

  states: int
  pairs: int
  values: int


_FORWARD = _Products(states=3, pairs=2, values=2)
_ADVANCE = _Products(states=2, pairs=1, values=1)
_BACKWARD = _Products(states=7, pairs=6, values=6)


def forward(shape: shapes.Shape, chunk: int, *, itemsize: int = 2) -> Cost:
  """Cost of the forward pass.

  Args:
    shape: Sizes; its length is rounded up to whole chunks.
    chunk: C.
    itemsize: Bytes of an element of query, key, value and out.
  """
  vectors = _vector_bytes(shape, itemsize, 2)
  values = 2 * _value_bytes(shape, itemsize)
  moved = vectors + values + _gate_bytes(shape) + 2 * _state_bytes(shape)
  return _work(shape, chunk, _FORWARD, moved)


def advance(shape: shapes.Shape, chunk: int, *, itemsize: int = 2) -> Cost:
  """Cost of making the state of each chunk's start."""
  num_chunks = -(-shape.length // chunk)
  moved = (
      _vector_bytes(shape, itemsize, 1)
      + _value_bytes(shape, itemsize)
      + _gate_bytes(shape)
      + (1 + num_chunks) * _state_bytes(shape)
  )
  return _work(shape, chunk, _ADVANCE, moved)


def reverse(shape: shapes.Shape, chunk: int, *, itemsize: int = 2) -> Cost:
  """Cost of the sweep from the last chunk to the first."""
  num_chunks = -(-shape.length // chunk)
  # Gradients of shared keys are added over value heads, which needs float32.
  is_grouped = shape.num_key_heads < shape.num_heads
  num_groups = shape.num_heads // shape.num_key_heads
  vectors = _vector_bytes(shape, itemsize, 2)
  wide = _vector_bytes(shape, 4 if is_grouped else itemsize, 2) * num_groups
  moved = (
      vectors
      + wide
      + 3 * _value_bytes(shape, itemsize)
      + 2 * _gate_bytes(shape)
      + (2 + num_chunks) * _state_bytes(shape)
  )
  return _work(shape, chunk, _BACKWARD, moved)


def backward(shape: shapes.Shape, chunk: int, *, itemsize: int = 2) -> Cost:
  """Cost of the backward pass by all arrays."""
  parts = [f(shape, chunk, itemsize=itemsize) for f in (advance, reverse)]
  return Cost(
      flops=sum(x.flops for x in parts),
      bytes_accessed=sum(x.bytes_accessed for x in parts),
      transcendentals=sum(x.transcendentals for x in parts),
  )


def step(shape: shapes.Shape, *, itemsize: int = 2) -> Cost:
  """Cost of one decode step: `shape.length` does not count."""
  one = dataclasses.replace(shape, length=1)
  heads = shape.batch * shape.num_heads
  decays = shape.key_size if shape.is_by_channel else 1
  return Cost(
      # Decay, what is recalled, outer product and its sum, and the read.
      flops=7 * heads * shape.key_size * shape.value_size,
      bytes_accessed=2 * _state_bytes(one)
      + _vector_bytes(one, itemsize, 2)
      + 2 * _value_bytes(one, itemsize)
      + _gate_bytes(one),
      transcendentals=heads * decays,
  )


def _work(shape: shapes.Shape, chunk: int, made: _Products, moved: int) -> Cost:
  chunks = shape.batch * shape.num_heads * -(-shape.length // chunk)
  key, value = shape.key_size, shape.value_size
  num_bits = chunk.bit_length() - 1
  passes = num_bits if shape.is_by_channel else 1
  square = chunk**2
  products = (
      made.states * chunk * key * value
      + made.pairs * passes * square * key
      + made.values * square * value
      # Two a round of the inverse but for the first.
      + 2 * max(num_bits - 1, 0) * square * chunk
  )
  powers = chunk * (num_bits + 2) * key if shape.is_by_channel else square
  return Cost(
      flops=2 * chunks * products,
      bytes_accessed=moved,
      transcendentals=chunks * powers,
  )


def _vector_bytes(shape: shapes.Shape, itemsize: int, number: int) -> int:
  rows = shape.batch * shape.length * shape.num_key_heads
  return number * itemsize * rows * shape.key_size


def _value_bytes(shape: shapes.Shape, itemsize: int) -> int:
  rows = shape.batch * shape.length * shape.num_heads
  return itemsize * rows * shape.value_size


def _gate_bytes(shape: shapes.Shape) -> int:
  decays = shape.key_size if shape.is_by_channel else 1
  return 4 * shape.batch * shape.length * shape.num_heads * (1 + decays)


def _state_bytes(shape: shapes.Shape) -> int:
  heads = shape.batch * shape.num_heads
  return 4 * heads * shape.key_size * shape.value_size
