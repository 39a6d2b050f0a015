from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np

from joma.transformer import norm
from tests import draws

# Ten times the largest float32 error seen.
_TOLERANCE = 5e-6


class NormTest(parameterized.TestCase):

  @parameterized.product(kind=("layer_norm", "rms_norm"), offset=(0.0, 1.0))
  def test_equals_numpy(self, kind, offset):
    x = 3 + np.random.default_rng(0).normal(size=(2, 3, 16))
    module = norm.Norm(kind, 1e-3, offset)
    scale = np.linspace(-1, 1, 16)
    bias = np.linspace(2, 3, 16)
    params = {"scale": jnp.float32(scale)}
    centered = x
    if kind == "layer_norm":
      params["bias"] = jnp.float32(bias)
      centered = x - x.mean(-1, keepdims=True)
    want = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-3)
    want = want * (scale + offset) + (bias if kind == "layer_norm" else 0)
    got = module.apply({"params": params}, jnp.float32(x))
    np.testing.assert_allclose(got, want, atol=_TOLERANCE)

  @parameterized.parameters(0.0, 1.0)
  def test_starts_neutral(self, offset):
    x = draws.normal(0, 4, 64)
    module = norm.Norm("rms_norm", 0.0, offset)
    got, _ = module.init_with_output(jax.random.key(1), x)
    ones = jnp.ones(4)
    chex.assert_trees_all_close((got**2).mean(axis=-1), ones, atol=_TOLERANCE)

  def test_statistics_are_float32(self):
    # In bfloat16 a mean of 256 would swallow deviations of 1.
    x = jnp.bfloat16(256 + jnp.array([[-2.0, 2.0, -2.0, 2.0]]))
    module = norm.Norm("layer_norm", 0.0, dtype=jnp.bfloat16)
    got, _ = module.init_with_output(jax.random.key(1), x)
    chex.assert_type(got, jnp.bfloat16)
    np.testing.assert_array_equal(
        np.float32(got), np.float32([[-1.0, 1.0, -1.0, 1.0]])
    )
