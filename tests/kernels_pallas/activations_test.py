"""Tests of activations beside formulas in float64."""

import math

from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import activations


class GeluByErfTest(absltest.TestCase):

  def test_value_and_slope(self):
    x = np.linspace(-6.0, 6.0, 97)
    normal = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x])
    slope = normal + x * np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    found = jax.vmap(jax.value_and_grad(activations.gelu_by_erf))
    values, slopes = found(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(values, x * normal, atol=1e-6)
    np.testing.assert_allclose(slopes, slope, atol=1e-6)


if __name__ == "__main__":
  absltest.main()
