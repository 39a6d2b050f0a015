"""Tests of laws in float64: their tolerances, and classes that overlap."""

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

# A few hundred float64 roundings of numbers near 1.
ATOL = 1e-12
# The same in float32.
ATOL_32 = 1e-5
# Along an integrated path: ten times the largest error seen.
ATOL_FLOW = 1e-8


class TestCase(parameterized.TestCase):
  """Runs each test in float64."""

  def setUp(self):
    super().setUp()
    self.enter_context(jax.enable_x64(True))


def two_queries() -> tuple[jax.Array, jax.Array]:
  """P(l|n) and psi(n) of four classes, two to a query, that overlap."""
  generator = np.random.default_rng(0)
  probs = generator.dirichlet(np.ones(8), size=4)
  probs[:, 6:] = 0
  return jnp.asarray(probs), jnp.array([6, 6, 7, 7])
