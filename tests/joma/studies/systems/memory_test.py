from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.studies.systems import memory
from tests.joma.studies.systems import small


class MemoryTest(parameterized.TestCase):

  @pytest.mark.slow
  def test_runs_and_is_drawn(self):
    summary = small.measured("memory")
    # Two deep memories at the one number of pairs above four channels.
    self.assertLen(summary["claims"], 2)
    figure, texts = small.drawn("memory")
    self.assertLen(figure.axes, 1)
    self.assertContainsSubset(["linear", "pairs"], texts)

  @parameterized.parameters(
      ("linear", 256),
      ("deep, equal bytes", 256),
      ("deep, twice the bytes", 512),
  )
  def test_numbers_of_a_memory_are_those_that_its_name_says(self, name, want):
    problem = memory.Lists(config=memory.MemoryConfig(), name=name, count=8)
    params = problem.init(jax.random.key(0))
    self.assertEqual(sum(leaf.size for leaf in params["weights"]), want)

  def test_a_linear_memory_without_more_is_the_delta_rule(self):
    config = memory.MemoryConfig(batch_size=2, size=4)
    problem = memory.Lists(config=config, name="linear", count=6)
    key = jax.random.key(3)
    params = {
        "weights": [jnp.zeros((1, 4, 4))],
        # Steps of a half of the gradient: what is missing, all of it.
        "rates": jnp.array([-40.0, 40.0, -40.0]),
    }
    error, share = jax.jit(problem.loss)(params, key)
    drawn = np.float64(jax.random.normal(key, (2, 2, 6, 1, 4)))[:, :, :, 0]
    keys, values = drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)
    errors, right = [], []
    for row in range(2):
      state = np.zeros((4, 4))
      for at, value in zip(keys[row], values[row], strict=True):
        state += np.outer(at, value - at @ state)
      found = keys[row] @ state
      errors.append(np.square(found - values[row]).sum(axis=-1))
      near = (found @ values[row].T).argmax(axis=-1)
      right.append(near == np.arange(6))
    np.testing.assert_allclose(error, np.mean(errors), rtol=1e-5)
    np.testing.assert_allclose(share, np.mean(right), atol=1e-6)


if __name__ == "__main__":
  absltest.main()
