from absl.testing import absltest

from kernels_pallas.gather_mlp import cost
from kernels_pallas.gather_mlp import shapes

_SHAPE = shapes.Shape(batch=3, width=8, num_neurons=40, block_size=4)


class CostTest(absltest.TestCase):

  def test_hand_count_of_the_forward(self):
    work = cost.forward(_SHAPE, 2)
    # 8 neurons, 3 sequences: 8 products into a neuron, 8 out of it.
    self.assertEqual(work.flops, 3 * 8 * (2 * 8 + 2 * 8))
    # 8 rows of up and of down, x and y, of 2 bytes an element.
    self.assertEqual(work.bytes_accessed, 2 * (8 * 8 + 8 * 8 + 3 * 8 + 3 * 8))

  def test_bytes_of_the_weights_are_density_times_dense(self):
    one = shapes.Shape(batch=1, width=4096, num_neurons=16_384)
    dense = cost.dense(one)
    tenth = cost.forward(one, 13)
    own = 2 * 2 * 4096  # x and y.
    self.assertEqual(
        (tenth.bytes_accessed - own) * 128, (dense.bytes_accessed - own) * 13
    )

  def test_hand_count_of_a_gated_backward(self):
    shape = shapes.Shape(
        batch=3, width=8, num_neurons=40, block_size=4, is_gated=True
    )
    work = cost.backward(shape, 2)
    # Products of 8 a neuron and sequence: up and gate again; to x from both and
    # to the neuron from d_out; the gradients of all three.
    self.assertEqual(work.flops, 3 * 8 * 2 * 8 * (2 + 3 + 3))
    # 8 rows of 3 matrices read and written, zeros of all 40 rows before; x,
    # d_out and d_x.
    elements = 2 * 3 * 8 * 8 + 3 * 40 * 8 + 3 * 3 * 8
    self.assertEqual(work.bytes_accessed, 2 * elements)


if __name__ == "__main__":
  absltest.main()
