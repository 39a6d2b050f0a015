from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from kernels_pallas import masks
from kernels_pallas.attention import cost
from kernels_pallas.attention import shapes


class CostTest(parameterized.TestCase):

  @parameterized.parameters(
      (None, 2 * 10 * 10),
      (masks.causal(10), 2 * 55),
      (masks.sliding_window(10, window=3), 2 * (1 + 2 + 8 * 3)),
      (masks.document(np.array([[0] * 10, [0] * 5 + [1] * 5])), 55 + 15 + 15),
  )
  def test_pairs(self, mask, expected):
    shape = shapes.Shape(
        batch=2,
        num_queries=10,
        num_keys=10,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
    )
    self.assertEqual(cost.num_pairs(mask, shape), expected)

  def test_a_span_that_is_empty_has_no_pairs(self):
    starts, stops = np.array([[5, 0]]), np.array([[3, 4]])
    shape = shapes.Shape(
        batch=2,
        num_queries=2,
        num_keys=10,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
    )
    self.assertEqual(cost.num_pairs(masks.Mask(starts, stops), shape), 2 * 4)

  def test_hand_count(self):
    # T = S = 10, N = 4, K = 2, H = 8: query 320, key 160 elements.
    shape = shapes.square(10, 4, 2, 8)
    forward = cost.forward(shape, 55)
    # 55 pairs x 4 heads x (2 x 8 for the logit + 2 x 8 for the value).
    self.assertEqual(forward.flops, 55 * 4 * 32)
    self.assertEqual(forward.transcendentals, 220)
    # query, out, key, value in 2 bytes; lse of 40 rows in 4.
    self.assertEqual(forward.bytes_accessed, 2 * (640 + 320) + 160)
    with_mass = cost.forward(shape, 55, return_col_mass=True)
    self.assertEqual(
        with_mass.bytes_accessed - forward.bytes_accessed, 4 * 4 * 10
    )
    backward = cost.backward(shape, 55)
    self.assertEqual(backward.flops, 55 * 4 * 80)
    # query, d_out, d_query; key, value and theirs; lse and delta.
    self.assertEqual(backward.bytes_accessed, 2 * (960 + 640) + 320)

  def test_roofline(self):
    work = cost.Cost(flops=300, bytes_accessed=20, transcendentals=0)
    self.assertEqual(work.seconds(100.0, 10.0), 3.0)
    self.assertEqual(work.seconds(1000.0, 10.0), 2.0)


if __name__ == "__main__":
  absltest.main()
