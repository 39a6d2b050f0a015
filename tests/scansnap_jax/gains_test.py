from absl.testing import absltest
from absl.testing import parameterized
import jax.numpy as jnp
import numpy as np
import pytest

from scansnap_jax import dynamics
from scansnap_jax import flow
from scansnap_jax import gains
from scansnap_jax import growth
from scansnap_jax.theorems import attention
from scansnap_jax.theorems import oracles
from tests.scansnap_jax.theorems import float64


class Theorem3Test(float64.TestCase):

  def test_gain_of_the_initial_probabilities(self):
    probs = jnp.asarray(attention.one_common())[0]
    self.assertAlmostEqual(gains.relative_gain(probs, 4, 1), 15, places=10)

  def test_gain_grows_by_chi_along_the_attention_flow(self):
    probs, start = jnp.asarray(attention.one_common()), jnp.zeros((13, 13))
    attn_logits, exponent = flow.integrate_attention(
        jnp.linspace(0.0, 3.0, 4),
        *(start, probs, jnp.zeros(3, int)),
        gamma=lambda t: 1 + t,
        eta_z=0.5,
    )
    z = attn_logits[:, 0]
    gain = gains.relative_gain(probs[:1] * jnp.exp(z), 4, 2)
    chi = gains.gain_growth(z[:, 4], z[0, 4])
    np.testing.assert_allclose(gain, gain[0] * chi, rtol=float64.ATOL_FLOW)
    feature = dynamics.l2_normalize(probs)[0, 4]
    lower, upper = gains.gain_growth_bounds(feature, exponent[:, 0])
    self.assertTrue((lower[1:] < chi[1:]).all())
    self.assertTrue((chi[1:] < upper[1:]).all())

  def test_bounds_are_exponentials_of_the_exponent(self):
    lower, upper = gains.gain_growth_bounds(0.5, jnp.array([0.0, 2.0]))
    np.testing.assert_allclose(lower, [1, np.e], rtol=float64.ATOL)
    np.testing.assert_allclose(upper, [1, np.exp(4)], rtol=float64.ATOL)


class StochasticTest(parameterized.TestCase):
  """Syn-Small by SGD, as in the experiments; values in docs/theory.md."""

  def _train(self, num_seeds=4, **rates):
    """Takes 100 steps with each seed; returns rows 0 of Z."""
    runs = [
        oracles.stochastic_attention(seed, **rates) for seed in range(num_seeds)
    ]
    return np.stack(runs)[:, 0]

  @parameterized.parameters(
      (1.0, 1.0, 0.0, [0.410, 0.174, 0.030], [0.509, 0.217, 0.033]),
      (1.0, 1.0, 0.9, [0.588, 0.287, 0.033], [0.808, 0.408, 0.048]),
      (10.0, 1.0, 0.0, [0.132, 0.049, 0.004], [0.284, 0.082, 0.006]),
      (10.0, 1.0, 0.9, [0.207, 0.079, 0.006], [0.556, 0.208, 0.012]),
      (1.0, 0.1, 0.0, [0.024, 0.004, 0.004], [0.062, 0.012, 0.004]),
      (1.0, 0.1, 0.9, [0.050, 0.010, 0.004], [0.162, 0.033, 0.006]),
  )
  @pytest.mark.slow
  def test_gain_departs_from_chi_as_rates_grow(
      self, eta_y, eta_z, momentum, median, high
  ):
    z = self._train(200, eta_y=eta_y, eta_z=eta_z, momentum=momentum)
    probs = oracles.syn_small()[0]
    others = np.array([18, 15, 10])  # Of ranks 2, 5 and 10.
    weights = probs * np.exp(z)
    gain = (weights[:, 19:20] / weights[:, others]) ** 2 - 1
    initial = (probs[19] / probs[others]) ** 2 - 1
    error = np.abs(gain / (initial * np.exp(2 * z[:, 19:20])) - 1)
    # Half a unit of the third digit, which docs/theory.md prints.
    found = np.quantile(error, [0.5, 0.95], axis=0)
    np.testing.assert_allclose(found, [median, high], atol=6e-4)

  @parameterized.parameters((0.1, 0.01, 0.9, 0.118), (1.0, 0.1, 0.0, 0.148))
  def test_momentum_has_not_reached_the_tenfold_rate(
      self, eta_y, eta_z, momentum, expected
  ):
    z = self._train(eta_y=eta_y, eta_z=eta_z, momentum=momentum)
    self.assertAlmostEqual(np.mean(z[:, 19]), expected, delta=5e-4)


class Theorem4Test(float64.TestCase):

  @parameterized.parameters(
      (0.5, 45.2, 2046),
      (1.0, 34.7, 1205),
      (2.0, 26.3, 691),
      (5.0, 18.0, 324),
  )
  @pytest.mark.by_default(0, 1)
  def test_heights_of_figure_3_by_either_reading(self, eta_y, chi, normalizer):
    run = growth.TheoryRun(
        num_tokens=1000, num_classes=10, eta_y=eta_y, eta_z=0.5
    )
    exponent = gains.gain_exponent(700.0, run)
    _, upper = gains.gain_growth_bounds(1.0, exponent)
    self.assertAlmostEqual(upper, chi, delta=0.05)
    times = jnp.linspace(0.0, 700.0, 7001)
    area = jnp.trapezoid(growth.gamma(times, run), times)
    self.assertAlmostEqual(1 + 4 * 0.5 * area, normalizer, delta=0.5)

  # Integrated as an ordinary differential equation by SciPy 1.17, rtol 1e-12.
  @parameterized.parameters(
      (1.0, 1.0, 0.0237797632),
      (1.0, 10.0, 0.5986931184),
      (1.0, 700.0, 1.7736524210),
      (0.2, 10.0, 0.9821143738),
      (0.2, 700.0, 2.1758459311),
  )
  def test_exponent_equals_the_integrated_one(self, c0, time, expected):
    run = growth.TheoryRun(
        num_tokens=1000, num_classes=10, eta_y=1.0, eta_z=0.5, c0=c0
    )
    self.assertAlmostEqual(
        gains.gain_exponent(time, run), expected, delta=float64.ATOL_FLOW
    )

  def test_printed_form_does_not_start_at_zero(self):
    run = growth.TheoryRun(
        num_tokens=1000, num_classes=10, eta_y=1.0, eta_z=0.5, c0=0.2
    )
    self.assertEqual(gains.gain_exponent(0.0, run), 0)
    printed = gains.gain_exponent_as_printed(jnp.array([0.0, 10.0]), run)
    np.testing.assert_allclose(
        printed, [np.log(0.2) / 4, 0.5797548957], rtol=float64.ATOL_FLOW
    )

  def test_leading_orders_are_approached_from_above(self):
    run = growth.TheoryRun(
        num_tokens=1000, num_classes=10, eta_y=1.0, eta_z=0.5, c0=0.2
    )
    times = jnp.geomspace(1e-3, 1e30, 100)
    exponent = gains.gain_exponent(times, run)
    scanning = gains.scanning_exponent(times, run)
    snapping = gains.snapping_exponent(times, run)
    self.assertTrue((scanning >= exponent).all())
    self.assertTrue((snapping >= exponent).all())
    self.assertAlmostEqual(scanning[0] / exponent[0], 1, delta=1e-3)
    self.assertAlmostEqual(snapping[-1], exponent[-1], delta=1e-12)


if __name__ == "__main__":
  absltest.main()
