from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.decode import slots
from tests import draws


class QuantizeTest(parameterized.TestCase):

  @parameterized.parameters(1e-20, 1.0, 1e20)
  @pytest.mark.by_default(0, 1)
  def test_is_off_by_half_a_step_at_most(self, size):
    x = size * draws.normal(0, 50, 32)
    steps, scale = slots.quantize(x)
    self.assertEqual(steps.dtype, jnp.int8)
    np.testing.assert_allclose(scale, np.abs(x).max(axis=1) / 127, rtol=1e-6)
    back = np.float64(steps) * np.float64(scale)[:, None]
    # Half a step, and the roundings of float32.
    off = np.abs(back - x) / np.float64(scale)[:, None]
    self.assertLessEqual(off.max(), 0.5 + 127 * 2.0**-22)
    np.testing.assert_array_equal(np.abs(steps).max(axis=1), 127)

  def test_zeros_stay_zeros(self):
    steps, scale = slots.quantize(jnp.zeros((2, 8)))
    np.testing.assert_array_equal(steps, 0)
    np.testing.assert_array_equal(scale, 0)


class EmptyTest(parameterized.TestCase):

  def test_has_no_token_and_buffers_of_its_own(self):
    for dtype in (jnp.float32, jnp.int8):
      cache = slots.empty(2, 3, 16, 8, dtype)
      self.assertEqual(cache.capacity, 16)
      self.assertEqual(cache.is_quantized, dtype == jnp.int8)
      np.testing.assert_array_equal(cache.pos, -1)
      leaves = jax.tree.leaves(cache)
      places = {x.unsafe_buffer_pointer() for x in leaves}
      self.assertLen(places, len(leaves))


if __name__ == "__main__":
  absltest.main()
