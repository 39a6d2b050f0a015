import functools
import math

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.theory import convergence
from joma.theory import published
from tests.scansnap_jax.theorems import float64

_MU = (3.0, 2.0, 1.0)
_START = 0.01
# Along an integrated path: ten times the largest relative error seen.
_RTOL_FLOW = 1e-9
_TIMES = (*np.linspace(0.0, 8.0, 81), 16.0, 64.0, 256.0, 1e6)


@functools.cache
def _whole_path(has_attention):
  return convergence.integrate(
      *(jnp.array(_TIMES), jnp.array(_MU), jnp.full(3, _START)),
      has_attention=has_attention,
  )


def _path(times, has_attention=True):
  at = [int(np.argmin(np.abs(np.array(_TIMES) - t))) for t in times]
  return _whole_path(has_attention)[np.array(at)]


class FlowTest(float64.TestCase):

  def test_components_obey_their_equation(self):
    mu = jnp.array(_MU)
    v_of = lambda gap: convergence.components(gap, mu)
    gap = jnp.array([0.3, 1.0, 4.0])
    v, velocity = jax.jvp(v_of, (gap,), (jnp.exp(v_of(gap) ** 2 / 2),))
    chex.assert_trees_all_close(
        velocity, (mu - v) * jnp.exp(v**2 / 2), atol=1e-12
    )
    chex.assert_trees_all_close(
        convergence.log_inverse_gap(v, mu), gap, atol=1e-12
    )

  def test_agrees_with_an_integration_of_v(self):
    # Reference: an independent integration of v in NumPy.
    delta = [0.4479165847500244, 0.5586417552428139, 0.5907867484405501]
    chex.assert_trees_all_close(
        jnp.exp(-_path([0.5])[0]), jnp.array(delta), atol=1e-9
    )

  def test_without_attention_all_converge_at_one_rate(self):
    gap = _path([1.0, 5.0, 64.0], has_attention=False)
    start = -jnp.log1p(-_START / jnp.array(_MU))
    chex.assert_trees_all_close(
        gap, start[None] + jnp.array([[1.0], [5.0], [64.0]]), rtol=_RTOL_FLOW
    )

  @pytest.mark.slow
  def test_time_to_reach_inverts_the_flow(self):
    times = jnp.array([0.2, 0.7, 2.0, 64.0])
    gap = _path(times)
    for j, mu in enumerate(_MU):
      reached = convergence.time_to_reach(gap[:, j], mu, _START)
      chex.assert_trees_all_close(reached, times, rtol=_RTOL_FLOW)


class RatioTest(float64.TestCase):

  def test_limits(self):
    self.assertAlmostEqual(float(convergence.ratio_limit(2, 1)), math.e**1.5)
    self.assertAlmostEqual(float(convergence.ratio_limit(3, 2)), math.e**2.5)
    gap = _path([256.0, 1e6])
    slow, fast = gap[:, 1] / gap[:, 2], gap[:, 0] / gap[:, 1]
    # Reference: an independent integration in log space in NumPy.
    np.testing.assert_allclose(slow[0], 4.4759124090975915, rtol=_RTOL_FLOW)
    np.testing.assert_allclose(fast[0], 12.193966256770311, rtol=_RTOL_FLOW)
    # Lambda is lambda e^{mu^2 / 2} / L, less than 1e-6 here.
    np.testing.assert_allclose(slow[1], 4.4816890703, rtol=1e-6)
    np.testing.assert_allclose(fast[1], 12.1824939607, rtol=1e-6)

  # Expected: scipy.integrate.quad. Settled at -.32929486 and .24027234 in an
  # independent integration.
  @parameterized.parameters(
      (1, 2, -0.32929485912025924), (0, 1, 0.24027233476921228)
  )
  @pytest.mark.slow
  def test_lambda_tends_to_its_limit(self, j, k, expected):
    limit = convergence.lambda_limit(_MU[j], _MU[k], _START, _START)
    self.assertAlmostEqual(float(limit), expected, places=12)
    gap = _path([16.0, 64.0])
    measured = convergence.measured_lambda(gap[:, j], gap[:, k], _MU[j], _MU[k])
    np.testing.assert_allclose(measured, [expected] * 2, atol=1e-8)


class AttentionEntropyTest(float64.TestCase):

  @parameterized.parameters(
      (True, [1.0983, 0.9298, 0.0062, 0.0165, 0.0432]),
      (False, [1.0984, 1.0319, 0.7850, 0.5022, 0.0433]),
  )
  @pytest.mark.by_default(0)
  def test_falls_then_rises_only_with_attention(self, has_attention, expected):
    times = np.linspace(0.1, 8.0, 80)
    gap = _path(times, has_attention=has_attention)
    v = convergence.components(gap, jnp.array(_MU))
    entropy = convergence.attention_entropy(v)
    at = [0, 3, 6, 9, 79]
    expected[0] = 1.0980863742 if has_attention else 1.0981205173
    np.testing.assert_allclose(entropy[np.array(at)], expected, atol=5e-5)
    steps = jnp.diff(entropy)
    if has_attention:
      bottom = int(entropy.argmin())
      self.assertBetween(times[bottom], 0.6, 0.8)
      self.assertTrue((steps[:bottom] < 0).all())
      self.assertTrue((steps[bottom:] > 0).all())
    else:
      self.assertTrue((steps < 0).all())

  def test_no_attention_yet(self):
    entropy = convergence.attention_entropy(jnp.full(3, _START))
    self.assertAlmostEqual(float(entropy), 1.0986122887, places=9)


class Figure4Test(parameterized.TestCase):

  def test_reproduces_the_published_trajectory(self):
    path = jax.jit(convergence.figure4_path)(jnp.array(published.FIGURE4_MU))
    chex.assert_type(path.entropy, jnp.float32)
    bottom = int(path.entropy.argmin())
    self.assertBetween(bottom, 668, 670)
    # Rounding to five digits, and float32.
    self.assertAlmostEqual(float(path.entropy[bottom]), 0.94157, delta=1e-5)
    for step, expected in ((0, 2.3026), (100, 2.3015), (300, 2.2105)):
      self.assertAlmostEqual(float(path.entropy[step]), expected, delta=6e-5)
    self.assertGreater(path.entropy[-1], path.entropy[bottom] + 0.5)
    self.assertLen(path.v, 5001)

  @parameterized.parameters(
      dict(temperature=2.0), dict(step_size=0.021), dict(initial=0.06)
  )
  @pytest.mark.by_default(0, 1)
  def test_every_constant_matters(self, **changes):
    entropy = convergence.figure4_path(
        jnp.array(published.FIGURE4_MU), **changes
    ).entropy
    is_same_bottom = abs(int(entropy.argmin()) - 669) <= 1
    is_same_value = abs(float(entropy.min()) - 0.94157) < 1e-5
    self.assertFalse(is_same_bottom and is_same_value)


if __name__ == "__main__":
  absltest.main()
