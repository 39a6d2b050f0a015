"""Sums of products that the backward pass of a TPU reads."""

from absl.testing import absltest
from absl.testing import parameterized
import jax.numpy as jnp
import numpy as np

from kernels_pallas.attention.tpu import row_products
from tests.kernels_pallas import modes


class RowProductsTest(parameterized.TestCase):

  # XLA's, of whole blocks, and of a last one that is padded.
  @parameterized.parameters(40, 1024, 1500)
  def test_equals_the_formula(self, length):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 2, length, 3, 24)).astype(np.float32)
    x, y = jnp.asarray(x, jnp.bfloat16), jnp.asarray(y)
    with modes.mode_of("pallas_tpu"):
      found = row_products.row_products(x, y)
    expected = (np.float64(x) * np.float64(y)).sum(axis=-1).swapaxes(1, 2)
    # As many roundings as there are terms, of their sizes.
    sizes = np.abs(np.float64(x) * np.float64(y)).sum(axis=-1).swapaxes(1, 2)
    self.assertEqual(found.dtype, jnp.float32)
    self.assertTrue((np.abs(found - expected) <= 24 * 2.0**-24 * sizes).all())


if __name__ == "__main__":
  absltest.main()
