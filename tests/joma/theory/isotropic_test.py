import functools

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.theory import dynamics
from joma.theory import isotropic
from tests.joma import problems
from tests.scansnap_jax.theorems import float64

# Quadrature: ten times the largest error seen.
_ATOL = 1e-12
_STD = 0.7


@functools.partial(jax.jit, static_argnums=0)
def _gaussian_moments(activation, r, norm):
  return isotropic.moments(
      *(r, norm, dynamics.ACTIVATIONS[activation]),
      density=isotropic.gaussian_density(_STD),
      reach=10 * _STD,
  )


class ClosedFormTest(float64.TestCase):

  @parameterized.parameters(
      ("relu", isotropic.relu_moments),
      ("quadratic", isotropic.quadratic_moments),
  )
  def test_quadrature_equals_closed_form(self, activation, closed_form):
    r = jnp.array([-30.0, -1.0, 0.0, 0.2, 3.0, 30.0])
    chex.assert_trees_all_close(
        _gaussian_moments(activation, r, 1.7),
        closed_form(r, 1.7, _STD),
        atol=_ATOL,
    )

  @parameterized.parameters("gelu", "silu")
  @pytest.mark.by_default(0)
  def test_second_moment_is_the_slope_of_the_first(self, activation):
    # Stein: E[y f(y)] = std^2 E[f'(y)] for f(y) = phi'(r + |v| y).
    first = lambda r: _gaussian_moments(activation, r[None], 1.7)[0][0]
    slope_of = jax.jit(jax.grad(first))
    for r in (-1.0, 0.4):
      _, second = _gaussian_moments(activation, jnp.array([r]), 1.7)
      slope = slope_of(jnp.array(r))
      chex.assert_trees_all_close(second[0], _STD**2 * 1.7 * slope, atol=1e-10)


class VelocityTest(float64.TestCase):
  """The theorem against E[g phi'(v^T x + xi) x], averaged over x itself."""

  @parameterized.parameters(*problems.ACTIVATIONS)
  @pytest.mark.by_default(1, 4)
  def test_gaussian_clouds(self, activation):
    generator = np.random.default_rng(0)
    centers = generator.normal(size=(2, 3))
    amounts, v, offset = np.array([0.8, -0.5]), np.array([0.3, -1.0, 0.6]), 0.2
    actual = isotropic.velocity(
        *map(jnp.asarray, (v, centers, amounts, offset)),
        functools.partial(_gaussian_moments, activation),
    )
    # Antithetic, so that the largest part of the noise cancels.
    noise = _STD * generator.normal(size=(100_000, 3))
    x = centers[:, None] + np.stack([noise, -noise], axis=1).reshape(-1, 3)
    inner = jnp.asarray(x @ v + offset)
    phi = dynamics.ACTIVATIONS[activation]
    _, slope = jax.jvp(phi, (inner,), (jnp.ones_like(inner),))
    terms = np.asarray(slope)[..., None] * x
    expected = amounts @ terms.mean(axis=1)
    error = np.abs(amounts) @ terms.std(axis=1) / np.sqrt(100_000)
    # Both clouds share the noise, so that their errors add up.
    np.testing.assert_array_less(np.abs(actual - expected), 4 * error + 1e-9)
    self.assertLess(error.max(), 6e-3)

  @pytest.mark.slow
  def test_clouds_need_not_be_gaussian(self):
    # Uniform on a sphere of radius 2 in three dimensions: one coordinate is
    # uniform on [-2, 2] (Archimedes). The average over the sphere is exact by
    # quadrature over height (Gauss-Legendre) and angle (equidistant).
    v, center = np.array([0.3, -1.0, 0.6]), np.array([0.5, 0.1, -0.4])
    phi = dynamics.ACTIVATIONS["silu"]
    moments = functools.partial(
        isotropic.moments, phi=phi, density=lambda y: 0.25 + 0 * y, reach=2.0
    )
    actual = isotropic.velocity(
        *map(jnp.asarray, (v, center[None], np.array([1.5]), 0.2)), moments
    )
    height, weight = np.polynomial.legendre.leggauss(60)
    angle = np.arange(100) * 2 * np.pi / 100
    ring = 2 * np.sqrt(1 - height**2)[:, None]
    x = center + np.stack(
        [
            ring * np.cos(angle),
            ring * np.sin(angle),
            np.broadcast_to(2 * height[:, None], (60, 100)),
        ],
        axis=-1,
    )
    slope = np.asarray(jax.vmap(jax.vmap(jax.grad(phi)))(x @ v + 0.2))
    average = np.einsum("i,ij,ijk->k", weight / 2, slope / 100, x)
    np.testing.assert_allclose(actual, 1.5 * average, atol=_ATOL)


if __name__ == "__main__":
  absltest.main()
