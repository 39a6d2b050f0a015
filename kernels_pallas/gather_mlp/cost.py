"""What a gathered MLP must compute and move: the roofline of the op.

A chosen neuron takes 2 D operations a sequence for each of its matrices, and in
the backward pass three times that: its value again, the cotangent of what went
in, that of the weights. Bytes are the floor: chosen weights once, and x and y.
"""

from typing import NamedTuple

from kernels_pallas.attention import cost as flash_cost
from kernels_pallas.gather_mlp import shapes

Cost = flash_cost.Cost


class Work(NamedTuple):
  """Sizes that decide a cost.

  Attributes:
    batch: B.
    width: D.
    num_chosen: Neurons that are chosen.
    num_neurons: F, all of them.
    num_matrices: 2, or 3 with a gate.
    itemsize: Bytes of an element.
    num_reads: How many times chosen weights are read.
  """

  batch: int
  width: int
  num_chosen: int
  num_neurons: int
  num_matrices: int
  itemsize: int
  num_reads: int = 1

  @property
  def num_weights(self) -> int:
    """Numbers of the chosen weights."""
    return self.num_matrices * self.num_chosen * self.width


def forward(
    shape: shapes.Shape, num_chosen_blocks: int, *, itemsize: int = 2
) -> Cost:
  """Cost of the forward pass, biases left out.

  Args:
    shape: Sizes.
    num_chosen_blocks: Different ones over the batch.
    itemsize: Bytes of an element.
  """
  return forward_of(_work(shape, num_chosen_blocks, itemsize))


def dense(shape: shapes.Shape, *, itemsize: int = 2) -> Cost:
  """Cost of the MLP of all neurons."""
  return forward(shape, shape.num_blocks, itemsize=itemsize)


def backward(
    shape: shapes.Shape, num_chosen_blocks: int, *, itemsize: int = 2
) -> Cost:
  """Cost of the backward pass; gradients of all weights are written."""
  return backward_of(_work(shape, num_chosen_blocks, itemsize))


def forward_of(work: Work) -> Cost:
  """As `forward`, of neurons that may be read several times."""
  rows, weights = work.batch * work.width, work.num_weights
  return Cost(
      flops=2 * work.batch * weights,
      bytes_accessed=work.itemsize * (work.num_reads * weights + 2 * rows),
      transcendentals=work.batch * work.num_chosen,
  )


def backward_of(work: Work) -> Cost:
  """As `backward`, of neurons that may be read several times."""
  rows, weights = work.batch * work.width, work.num_weights
  # Of the matrices that x is multiplied by, the values again; of each matrix
  # what goes on to its other side, and its gradient.
  products = 3 * weights - work.num_chosen * work.width
  moved = (work.num_reads + 1) * weights + 3 * rows
  moved += work.num_matrices * work.num_neurons * work.width  # Written.
  return Cost(
      flops=2 * work.batch * products,
      bytes_accessed=work.itemsize * moved,
      transcendentals=work.batch * work.num_chosen,
  )


def _work(shape: shapes.Shape, num_blocks: int, itemsize: int) -> Work:
  return Work(
      shape.batch,
      shape.width,
      num_blocks * shape.block_size,
      shape.num_neurons,
      shape.num_matrices,
      itemsize,
  )
