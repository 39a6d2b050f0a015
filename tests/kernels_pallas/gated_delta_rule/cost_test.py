import dataclasses

from absl.testing import absltest
from absl.testing import parameterized

from kernels_pallas.gated_delta_rule import cost
from kernels_pallas.gated_delta_rule import shapes

_SHAPE = shapes.Shape(
    batch=2,
    length=6,
    num_heads=2,
    num_key_heads=1,
    key_size=3,
    value_size=5,
)
# Two chunks of 4 positions, of 2 sequences and 2 heads each.
_CHUNKS = 8


class CostTest(parameterized.TestCase):
  """Counted by hand: products of 4 x 3 x 5, 4 x 4 x 3, 4 x 4 x 5, 4 x 4 x 4."""

  @parameterized.parameters(
      (cost.forward, 3 * 60 + 2 * 48 + 2 * 80 + 2 * 64),
      (cost.advance, 2 * 60 + 48 + 80 + 2 * 64),
      (cost.reverse, 7 * 60 + 6 * 48 + 6 * 80 + 2 * 64),
  )
  def test_products_of_a_chunk(self, count, products):
    found = count(_SHAPE, 4)
    self.assertEqual(found.flops, 2 * _CHUNKS * products)
    self.assertEqual(found.transcendentals, _CHUNKS * 16)

  def test_pairs_by_channel_are_made_for_each_bit(self):
    shape = dataclasses.replace(_SHAPE, is_by_channel=True)
    more = cost.forward(shape, 4).flops - cost.forward(_SHAPE, 4).flops
    self.assertEqual(more, 2 * _CHUNKS * 2 * 48)

  def test_every_array_moves_once(self):
    # Query and key, value and out of bfloat16; gates, states of float32.
    vectors, values, gates, states = 36 * 2, 120 * 2, 2 * 24 * 4, 60 * 4
    found = cost.forward(_SHAPE, 4).bytes_accessed
    self.assertEqual(found, 2 * vectors + 2 * values + gates + 2 * states)
    found = cost.advance(_SHAPE, 4).bytes_accessed
    self.assertEqual(found, vectors + values + gates + 3 * states)
    # Gradients of a shared key are float32, of each head.
    found = cost.reverse(_SHAPE, 4).bytes_accessed
    expected = 2 * vectors * (1 + 2 * 2) + 3 * values + 2 * gates + 4 * states
    self.assertEqual(found, expected)

  def test_backward_is_its_two_sweeps(self):
    parts = (cost.advance(_SHAPE, 4), cost.reverse(_SHAPE, 4))
    found = cost.backward(_SHAPE, 4)
    for name in ("flops", "bytes_accessed", "transcendentals"):
      expected = sum(getattr(x, name) for x in parts)
      self.assertEqual(getattr(found, name), expected)

  def test_a_step_does_not_know_the_length(self):
    found = cost.step(_SHAPE)
    longer = dataclasses.replace(_SHAPE, length=6000)
    self.assertEqual(found, cost.step(longer))
    self.assertEqual(found.flops, 7 * 4 * 15)
    # 4 states in and out, 2 query and key heads of 3, 4 values in and out of 5,
    # 4 decays and betas.
    expected = 2 * 4 * 60 + 2 * 2 * 2 * 3 + 2 * 2 * 4 * 5 + 2 * 4 * 4
    self.assertEqual(found.bytes_accessed, expected)


if __name__ == "__main__":
  absltest.main()
