from absl.testing import absltest

from kernels_pallas.decode import cost
from kernels_pallas.decode import shapes

_SHAPE = shapes.Shape(
    batch=2, num_heads=6, num_kv_heads=3, capacity=10, head_dim=8
)


class CostTest(absltest.TestCase):

  def test_hand_count(self):
    work = cost.step(_SHAPE)
    # 12 query heads, 10 slots: products of 8, and their sums, twice.
    self.assertEqual(work.flops, 12 * 10 * 2 * 2 * 8)
    self.assertEqual(work.transcendentals, 12 * 10)
    # 6 key heads of 10 slots: key, value, and score read and written, pos.
    cache = 6 * 10 * (2 * 16 + 4 + 4 + 4)
    # A key, a value, a position and a slot for each; query and out, key, value.
    new = 6 * (2 * 16 + 4 + 4) + 2 * (2 * 6 + 2 * 3) * 8 * 2 + 2 * 4
    self.assertEqual(work.bytes_accessed, cache + new)

  def test_hand_count_of_int8(self):
    wide, narrow = (cost.step(_SHAPE, cache_itemsize=n) for n in (None, 1))
    # 60 slots and 6 new ones: 8 bytes of 16 less, a scale of 4 more, twice.
    self.assertEqual(
        wide.bytes_accessed - narrow.bytes_accessed, 66 * 2 * (8 - 4)
    )

  def test_memory_bounds_a_step(self):
    # On a chip that does hundreds of operations a byte.
    work = cost.step(shapes.BENCHMARKS["b64_c16384"])
    self.assertLess(work.flops / work.bytes_accessed, 10)


if __name__ == "__main__":
  absltest.main()
