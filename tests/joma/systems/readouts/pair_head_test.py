"""Scores of pairs beside plain NumPy, and what a dot product cannot say."""

from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np

from joma.systems.readouts import pair_head
from tests import draws


class PairHeadTest(absltest.TestCase):

  def test_is_an_mlp_of_four_features(self):
    one, two = draws.normal(0, 5, 3), draws.normal(1, 5, 3)
    head = pair_head.PairHead("features", 4)
    params = jax.device_put(
        jax.tree.map(
            lambda leaf: np.random.default_rng(leaf.size)
            .normal(size=leaf.shape)
            .astype(np.float32),
            jax.eval_shape(head.init, jax.random.key(0), one, two)["params"],
        )
    )
    found = head.apply({"params": params}, one, two)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    for row in range(5):
      u, v = (np.sqrt(3) * np.float64(x[row]) for x in (one, two))
      x = np.concatenate([u, v, u * v, np.abs(u - v)])
      hidden = np.maximum(x @ p["up"]["kernel"] + p["up"]["bias"], 0)
      want = hidden @ p["down"]["kernel"] + p["down"]["bias"]
      np.testing.assert_allclose(found[row], want[0], rtol=1e-5, atol=1e-5)
    back = head.apply({"params": params}, two, one)
    self.assertGreater(np.abs(found - back).max(), 0.1)

  def test_a_dot_product_is_the_same_both_ways(self):
    one, two = draws.normal(0, 5, 3), draws.normal(1, 5, 3)
    head = pair_head.PairHead("dot")
    params = {"factor": jnp.array(2.0), "offset": jnp.array(-1.0)}
    found = head.apply({"params": params}, one, two)
    want = [2 * np.dot(u, v) - 1 for u, v in zip(one, two, strict=True)]
    np.testing.assert_allclose(found, want, rtol=1e-5)
    back = head.apply({"params": params}, two, one)
    np.testing.assert_array_equal(found, back)

  def test_what_is_taught_is_the_mean_square(self):
    found = pair_head.distil_loss(jnp.array([1.0, 3.0]), jnp.array([0.0, 1.0]))
    self.assertEqual(float(found), 2.5)


if __name__ == "__main__":
  absltest.main()
