from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.gather_mlp import selection


class TopBlocksTest(parameterized.TestCase):

  def test_are_ascending_and_ties_go_to_the_lower(self):
    scores = jnp.array([[1.0, 5, 2, 5, 2], [-1, -2, -3, -9, -jnp.inf]])
    ids, num = selection.top_blocks(scores, 3)
    np.testing.assert_array_equal(ids, [[1, 2, 3], [0, 1, 2]])
    np.testing.assert_array_equal(num, [3, 3])
    self.assertEqual((ids.dtype, num.dtype), (jnp.int32, jnp.int32))

  def test_minus_infinity_is_never_chosen(self):
    scores = jnp.array([-jnp.inf, 0.0, -jnp.inf, 1.0])
    ids, num = selection.top_blocks(scores, 3)
    np.testing.assert_array_equal(ids[:2], [1, 3])
    self.assertEqual(num, 2)

  def test_is_what_sorting_gives(self):
    scores = np.random.default_rng(0).standard_normal((7, 33))
    ids, num = jax.jit(selection.top_blocks, static_argnums=1)(scores, 10)
    want = np.sort(np.argsort(-scores, axis=-1)[:, :10], axis=-1)
    np.testing.assert_array_equal(ids, want)
    np.testing.assert_array_equal(num, 10)

  @parameterized.parameters(0, 6)
  def test_of_no_or_too_many(self, num_blocks):
    with self.assertRaisesRegex(ValueError, "must be from 1 to the 5 blocks"):
      selection.top_blocks(jnp.ones(5), num_blocks)


class ThresholdBlocksTest(absltest.TestCase):

  def test_those_above_at_most_the_best(self):
    scores = jnp.array([[0.1, 0.9, 0.5, 0.7], [0.1, 0.2, 0.3, 0.6]])
    ids, num = selection.threshold_blocks(scores, 0.5, 2)
    np.testing.assert_array_equal(num, [2, 1])
    np.testing.assert_array_equal(ids[0], [1, 3])
    np.testing.assert_array_equal(ids[1, :1], [3])

  def test_of_none_above(self):
    _, num = selection.threshold_blocks(jnp.zeros(4), 0.0, 4)
    self.assertEqual(num, 0)

  def test_the_threshold_may_be_traced(self):
    call = jax.jit(lambda t: selection.threshold_blocks(jnp.arange(4.0), t, 4))
    self.assertEqual(call(1.5)[1], 2)

  def test_too_many(self):
    with self.assertRaisesRegex(ValueError, "max_blocks=9 must be from 1"):
      selection.threshold_blocks(jnp.ones(4), 0.0, 9)


if __name__ == "__main__":
  absltest.main()
