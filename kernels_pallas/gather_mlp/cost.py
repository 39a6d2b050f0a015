"""What a gathered MLP must compute and move: the roofline of the op.

A chosen neuron takes 2 D operations a sequence for each of its matrices, and in
the backward pass three times that: its value again, the cotangent of what went
in, that of the weights. Bytes are the floor: chosen weights once, and x and y.
"""

from kernels_pallas.attention import cost as flash_cost
from kernels_pallas.gather_mlp import shapes

Cost = flash_cost.Cost


def forward(
    shape: shapes.Shape, num_chosen_blocks: int, *, itemsize: int = 2
) -> Cost:
  """Cost of the forward pass, biases left out.

  Args:
    shape: Sizes.
    num_chosen_blocks: Different ones over the batch.
    itemsize: Bytes of an element.
  """
  return forward_of(**_sizes(shape, num_chosen_blocks, itemsize))


def dense(shape: shapes.Shape, *, itemsize: int = 2) -> Cost:
  """Cost of the MLP of all neurons."""
  return forward(shape, shape.num_blocks, itemsize=itemsize)


def backward(
    shape: shapes.Shape, num_chosen_blocks: int, *, itemsize: int = 2
) -> Cost:
  """Cost of the backward pass; gradients of all weights are written."""
  return backward_of(**_sizes(shape, num_chosen_blocks, itemsize))


def forward_of(
    *,
    batch: int,
    width: int,
    num_chosen: int,
    num_neurons: int,
    num_matrices: int,
    itemsize: int,
    num_reads: int = 1,
) -> Cost:
  """As `forward`, of `num_chosen` neurons that are read so many times."""
  del num_neurons
  # Numbers of the chosen weights.
  neurons = num_matrices * num_chosen * width
  return Cost(
      flops=2 * batch * neurons,
      bytes_accessed=itemsize * (num_reads * neurons + 2 * batch * width),
      transcendentals=batch * num_chosen,
  )


def backward_of(
    *,
    batch: int,
    width: int,
    num_chosen: int,
    num_neurons: int,
    num_matrices: int,
    itemsize: int,
    num_reads: int = 1,
) -> Cost:
  """As `backward`, of `num_chosen` neurons that are read so many times."""
  neurons = num_matrices * num_chosen * width
  written = num_matrices * num_neurons * width
  # Of the matrices that x is multiplied by, the values again; of each matrix
  # what goes on to its other side, and its gradient.
  products = (num_matrices - 1) * num_chosen * width + 2 * neurons
  return Cost(
      flops=2 * batch * products,
      bytes_accessed=itemsize
      * (num_reads * neurons + neurons + written + 3 * batch * width),
      transcendentals=batch * num_chosen,
  )


def _sizes(shape: shapes.Shape, num_blocks: int, itemsize: int) -> dict:
  return {
      "batch": shape.batch,
      "width": shape.width,
      "num_chosen": num_blocks * shape.block_size,
      "num_neurons": shape.num_neurons,
      "num_matrices": shape.num_matrices,
      "itemsize": itemsize,
  }
