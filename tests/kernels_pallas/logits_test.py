from absl.testing import absltest
import jax.numpy as jnp
import numpy as np

from kernels_pallas import logits
from tests import draws


class LogitsTest(absltest.TestCase):

  def test_a_cap_bounds_and_keeps_what_is_small(self):
    x = jnp.array([-1e4, -1e-3, 0.0, 2.0, 1e4])
    np.testing.assert_allclose(
        logits.soft_cap(x, 2.0),
        [-2.0, -1e-3, 0.0, 2 * np.tanh(1.0), 2.0],
        rtol=1e-6,
    )
    np.testing.assert_array_equal(logits.soft_cap(x, None), x)

  def test_heads_of_a_group_read_one_key_head(self):
    query = np.asarray(draws.normal(0, 2, 3, 4, 5))
    key = np.asarray(draws.normal(1, 2, 6, 2, 5))
    found = logits.attention_logits(
        jnp.asarray(query), jnp.asarray(key), 0.5, 1.5, precision="highest"
    )
    for b, n, t, s in np.ndindex(2, 4, 3, 6):
      product = 0.5 * query[b, t, n] @ key[b, s, n // 2]
      self.assertAlmostEqual(
          float(found[b, n, t, s]), 1.5 * np.tanh(product / 1.5), places=5
      )


if __name__ == "__main__":
  absltest.main()
