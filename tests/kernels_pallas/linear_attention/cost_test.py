from absl.testing import absltest

from kernels_pallas.linear_attention import cost
from kernels_pallas.linear_attention import shapes

_SHAPE = shapes.Shape(
    batch=2, length=10, num_heads=4, num_kv_heads=2, head_dim=8
)


class CostTest(absltest.TestCase):

  def test_hand_count_of_the_forward(self):
    work = cost.forward(_SHAPE, 4)
    # 8 heads, 3 chunks: 4 x 4 weights of 8 products each, twice; and twice
    # 4 positions by 8 x 8 states. A product and its sum are two.
    self.assertEqual(work.flops, 8 * 3 * 2 * (2 * 4 * 4 * 8 + 2 * 4 * 8 * 8))
    # query and out 640 elements each, key and value 320; states in and out.
    self.assertEqual(work.bytes_accessed, 2 * 1920 + 2 * 4 * 8 * 64)
    # The powers between 4 x 4 positions of 8 heads; two a position, rounded up.
    self.assertEqual(work.transcendentals, 8 * 16 + 8 * 12 * 2)

  def test_hand_count_of_the_backward(self):
    work = cost.backward(_SHAPE, 4)
    self.assertEqual(work.flops, 3 * cost.forward(_SHAPE, 4).flops)
    # d_out, value, key, d_query; then key, query, d_out, and d_value in float32
    # for each query head; the same for d_key; states in and out of each.
    first = 2 * (640 + 320 + 320 + 640)
    other = 2 * (320 + 640 + 640) + 4 * 640
    self.assertEqual(work.bytes_accessed, first + 2 * other + 3 * 4096)

  def test_hand_count_of_a_step(self):
    work = cost.step(_SHAPE)
    # 8 states of 64: decay, product and sum; then product and sum.
    self.assertEqual(work.flops, 8 * 64 * 5)
    # The state both ways in 4 bytes; query and out 64 elements, key, value 32.
    self.assertEqual(work.bytes_accessed, 2 * 4 * 512 + 2 * 192)

  def test_work_grows_as_the_length(self):
    one, two = (
        cost.forward(shapes.BENCHMARKS[name], 256)
        for name in ("h128_4k", "h128_16k")
    )
    self.assertEqual(two.flops, 4 * one.flops)


if __name__ == "__main__":
  absltest.main()
