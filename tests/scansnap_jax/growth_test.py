from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scansnap_jax import dynamics
from scansnap_jax import gains
from scansnap_jax import growth
from scansnap_jax.theorems import oracles
from tests.scansnap_jax.theorems import float64


class Lemma5Test(float64.TestCase):

  def test_projected_decoder_and_error_follow_the_softmax_decoder(self):
    h = growth.h_discrete(20, num_tokens=7, eta_y=0.9)
    chex.assert_shape(h, (21,))
    # The oracle's class is token 0; this one is token 3.
    logits, errors = np.roll(oracles.softmax_decoder(20, 7, 0.9), 3, axis=-1)
    label = jnp.full(21, 3)
    projected = growth.projected_decoder(h, label, 7)
    chex.assert_trees_all_close(projected, logits, atol=float64.ATOL)
    error = growth.prediction_error(h, label, 7)
    chex.assert_trees_all_close(error, errors, atol=float64.ATOL)

  def test_first_step_is_eta_over_m(self):
    h = growth.h_discrete(1, num_tokens=1000, eta_y=0.3)
    chex.assert_trees_all_close(
        h, jnp.array([0, 0.3 / 1000]), atol=float64.ATOL
    )

  def test_float32_agrees_with_float64(self):
    expected = growth.h_discrete(400, num_tokens=1000, eta_y=1.0)
    with jax.enable_x64(False):
      actual = growth.h_discrete(400, num_tokens=1000, eta_y=1.0)
      chex.assert_type(actual, jnp.float32)
    np.testing.assert_allclose(actual, expected, rtol=float64.ATOL_32)


class Lemma6Test(float64.TestCase):

  @parameterized.parameters(2, 100, 10_000, 1_000_000)
  def test_h_solves_the_equation_from_tiny_to_huge_times(self, num_tokens):
    times = jnp.logspace(-8, 12, 201)
    h = growth.h_continuous(times, num_tokens=num_tokens, eta_y=0.7)
    x, y = num_tokens * h, num_tokens * 0.7 * times
    left = jnp.expm1(x) + (num_tokens - 1) * x
    # x up to 40 in the exponent: forty roundings, doubled.
    np.testing.assert_allclose(left, y, rtol=2e-14)

  @parameterized.parameters(2, 100, 10_000, 1_000_000)
  def test_float32_agrees_with_float64(self, num_tokens):
    times = jnp.logspace(-8, 12, 201)
    expected = growth.h_continuous(times, num_tokens=num_tokens, eta_y=0.7)
    actual = growth.h_continuous(
        times.astype(jnp.float32), num_tokens=num_tokens, eta_y=0.7
    )
    chex.assert_type(actual, jnp.float32)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)

  def test_derivative_is_the_continuous_recursion(self):
    h = lambda t: growth.h_continuous(t, num_tokens=100, eta_y=0.7)
    value, slope = jax.value_and_grad(h)(jnp.asarray(9.0))
    self.assertAlmostEqual(slope, 0.7 / (99 + np.exp(100 * value)), places=12)

  def test_h_starts_at_zero(self):
    self.assertEqual(growth.h_continuous(0.0, num_tokens=9, eta_y=1.0), 0)


class Lemma7Test(float64.TestCase):

  @parameterized.product(num_tokens=(50, 1000), eta_y=(0.1, 1.0, 2.0))
  @pytest.mark.by_default(0, 1)
  def test_discrete_and_continuous_h_stay_within_the_bound(
      self, num_tokens, eta_y
  ):
    setting = dict(num_tokens=num_tokens, eta_y=eta_y)
    gap = growth.h_discrete(300, **setting) - growth.h_continuous(
        jnp.arange(301.0), **setting
    )
    self.assertGreaterEqual(gap.min(), -float64.ATOL)
    self.assertLessEqual(gap.max(), growth.h_gap_bound(**setting))

  def test_bound_is_two_eta_over_m(self):
    self.assertEqual(growth.h_gap_bound(num_tokens=100, eta_y=0.5), 0.01)


class Lemma8Test(float64.TestCase):

  @parameterized.parameters(4, 30, 1000, 10_000)
  def test_omega_solves_its_equation(self, num_tokens):
    u = (1 + growth.omega_1(num_tokens)) * np.log(num_tokens)
    self.assertAlmostEqual(u, np.log((num_tokens - 1) * u), places=12)
    self.assertGreater(u, 1)

  def test_omega_needs_four_tokens(self):
    with self.assertRaisesRegex(ValueError, "got 3"):
      growth.omega_1(3)

  def test_phases_end_and_start_when_figure_3_says(self):
    # K ln M / eta = 20 ln 1000, and twice (1 + omega_1) = 1.31980 of it.
    run = growth.TheoryRun(num_tokens=1000, num_classes=10, eta_y=0.5)
    self.assertAlmostEqual(growth.scanning_end(run), 138.155105580, places=8)
    self.assertAlmostEqual(growth.snapping_start(run), 364.67530868, places=8)

  def test_exponential_term_takes_over_between_the_phases(self):
    run = growth.TheoryRun(num_tokens=1000, num_classes=10, eta_y=0.5)
    ends = [growth.scanning_end(run), growth.snapping_start(run)]
    x = 1000 * growth.h_continuous(
        jnp.array(ends) / 10, num_tokens=1000, eta_y=0.5
    )
    self.assertLess(jnp.exp(x[0]), 999)
    self.assertGreater(jnp.exp(x[1]), 999 * x[1])

  def test_first_phase_starts_soon_after_zero(self):
    # e^x <= (M - 1) x holds from t = .00100 K / eta_y on, and not at t = 0.
    times = jnp.array([0.0, 0.000995, 0.001005])
    x = 1000 * growth.h_continuous(times, num_tokens=1000, eta_y=1.0)
    self.assertSequenceEqual(
        (jnp.exp(x) <= 999 * x).tolist(), [False, False, True]
    )

  def test_figure_9_rounds_omega(self):
    run = growth.TheoryRun(num_tokens=100, num_classes=1, eta_y=10.0, eta_z=1.0)
    self.assertAlmostEqual(1 + growth.omega_1(100), 1.403, delta=5e-4)
    height = gains.gain_exponent(growth.snapping_start(run), run)
    self.assertAlmostEqual(height, 0.556, delta=5e-4)


class GammaTest(float64.TestCase):

  def test_equals_its_definition(self):
    run = growth.TheoryRun(num_tokens=50, num_classes=4, eta_y=0.3)
    times = jnp.geomspace(0.1, 1e4, 40)
    h = growth.h_continuous(times / 4, num_tokens=50, eta_y=0.3)
    expected = 49**2 * h / (49 + jnp.exp(50 * h))
    chex.assert_trees_all_close(
        growth.gamma(times, run), expected, atol=float64.ATOL
    )

  @parameterized.parameters((100, 2.602), (1000, 4.416), (10_000, 6.360))
  def test_peak_height_depends_on_m_alone(self, num_tokens, height):
    for num_classes, eta_y in ((1, 5.0), (10, 0.5)):
      run = growth.TheoryRun(
          num_tokens=num_tokens, num_classes=num_classes, eta_y=eta_y
      )
      time, peak = growth.gamma_peak(run)
      self.assertAlmostEqual(peak, height, delta=5e-4)
      around = growth.gamma(time * jnp.array([0.99, 1.0, 1.01]), run)
      self.assertAlmostEqual(around[1], peak, places=12)
      self.assertLess(around[0], peak)
      self.assertLess(around[2], peak)

  def test_leading_orders_are_approached(self):
    run = growth.TheoryRun(num_tokens=1000, num_classes=10, eta_y=0.5)
    early = growth.gamma(1e-3, run) / growth.gamma_early(1e-3, run)
    late = growth.gamma(1e20, run) / growth.gamma_late(1e20, run)
    self.assertAlmostEqual(early, 1, delta=1e-6)
    self.assertAlmostEqual(late, 1, delta=1e-6)

  def test_rates_can_be_mapped_over(self):
    def speed(eta_y):
      run = growth.TheoryRun(num_tokens=100, num_classes=2, eta_y=eta_y)
      return growth.gamma(3.0, run)

    actual = jax.vmap(speed)(jnp.array([0.5, 1.0]))
    expected = jnp.stack([speed(0.5), speed(1.0)])
    chex.assert_trees_all_close(actual, expected, atol=float64.ATOL)


class Corollary1Test(float64.TestCase):

  def test_error_is_reached_within_the_bound_and_not_much_before(self):
    run = growth.TheoryRun(num_tokens=200, num_classes=3, eta_y=0.5)
    for epsilon in (0.1, 0.01):
      bound = growth.num_steps_bound(epsilon, run)
      seen = jnp.array([0.9, 1.0]) * bound / 3
      h = growth.h_continuous(seen, num_tokens=200, eta_y=0.5)
      error = growth.prediction_error(h, jnp.zeros(2, int), 200)
      norm = jnp.linalg.norm(error, axis=1)
      self.assertLessEqual(norm[1], epsilon)
      self.assertGreater(norm[0], epsilon)

  def test_non_positive_epsilon_raises(self):
    run = growth.TheoryRun(num_tokens=200, num_classes=3, eta_y=0.5)
    with self.assertRaisesRegex(ValueError, "got 0.0"):
      growth.num_steps_bound(0.0, run)


class Theorem5Test(float64.TestCase):

  def test_features_read_the_logits_of_their_own_class(self):
    probs, query = float64.two_queries()
    features = jax.jit(dynamics.class_features)(probs, np.zeros((8, 8)), query)
    label, theta = jnp.arange(4), jnp.array([0.1, -0.1, 0.0, 0.2])
    decoder = jax.jit(growth.decoder_closed_form)(features, label, 0.3, theta)
    expected = (1 + theta)[:, None] * growth.projected_decoder(0.3, label, 8)
    chex.assert_trees_all_close(features @ decoder, expected, atol=1e-10)

  def test_theta_bound(self):
    # K / sqrt(N) = 4 / 20 and ln(K / delta) = 4.
    bound = growth.theta_bound(400, 4, 4 * np.exp(-4.0))
    self.assertAlmostEqual(bound, 0.4, places=12)

  @parameterized.parameters((0, 4, 0.5), (9, 0, 0.5), (9, 4, 0.0), (9, 4, 1.0))
  def test_out_of_range_arguments_raise(self, num_steps, num_classes, delta):
    with self.assertRaisesRegex(ValueError, f"{delta=}"):
      growth.theta_bound(num_steps, num_classes, delta)


if __name__ == "__main__":
  absltest.main()
