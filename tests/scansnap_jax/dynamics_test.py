from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from scansnap_jax import dynamics
from scansnap_jax import flow

# A few hundred float64 roundings of numbers near 1.
_ATOL = 1e-12
# The same in float32.
_ATOL_32 = 1e-5
# Along an integrated path: ten times the largest error seen.
_ATOL_FLOW = 1e-8


class Float64TestCase(parameterized.TestCase):
  """Runs each test in float64."""

  def setUp(self):
    super().setUp()
    self.enter_context(jax.enable_x64(True))


def _softmax(logits):
  weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
  return weights / weights.sum(axis=-1, keepdims=True)


def _unit(vectors):
  return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def _one_common_token():
  """Three classes of one query: token 0 in all, four distinct tokens each."""
  probs = np.zeros((3, 13))
  probs[:, 0] = 1
  for n in range(3):
    probs[n, 1 + 4 * n : 5 + 4 * n] = [0.1, 0.2, 0.3, 0.4]
  return jnp.asarray(probs / probs.sum(axis=1, keepdims=True))


def _two_queries():
  """Four classes, two to a query, that overlap at random."""
  generator = np.random.default_rng(0)
  probs = generator.dirichlet(np.ones(8), size=4)
  probs[:, 6:] = 0
  return jnp.asarray(probs), jnp.array([6, 6, 7, 7])


class FloatTypeTest(Float64TestCase):

  @parameterized.parameters(True, False)
  def test_laws_of_time_keep_float32(self, is_python):
    rate = 0.5 if is_python else jnp.float32(0.5)
    run = dynamics.Run(num_tokens=50, num_classes=3, eta_y=rate, eta_z=0.1)
    for law in (
        dynamics.gamma,
        dynamics.gamma_early,
        dynamics.gamma_late,
        dynamics.gain_exponent,
        dynamics.gain_exponent_as_printed,
        dynamics.scanning_exponent,
        dynamics.snapping_exponent,
    ):
      value = jax.jit(law)(jnp.array([1.0, 9.0], jnp.float32), run)
      chex.assert_type(value, jnp.float32)

  def test_laws_of_features_keep_float32(self):
    probs = _one_common_token().astype(jnp.float32)
    attn_logits = jnp.zeros((13, 13), jnp.float32)
    query, label = jnp.zeros(3, int), jnp.arange(3)
    features = jax.jit(dynamics.class_features)(probs, attn_logits, query)
    speed = jnp.float32(0.7)

    @jax.jit
    def laws(features, theta):
      return (
          dynamics.correlation(features),
          dynamics.modified_decoder_gradient(attn_logits, features, 0, 1),
          dynamics.backpropagated_gradient(features, speed),
          dynamics.xi(features, 1.0),
          dynamics.attention_velocity(features, query, speed),
          dynamics.distinct_velocity(features, speed),
          dynamics.common_velocity(features, speed),
          dynamics.symmetric_common_velocity(features, speed),
          dynamics.relative_gain(features, 4, 1),
          dynamics.gain_growth(features[0], 0.0),
          dynamics.gain_growth_bounds(0.5, features[0]),
          dynamics.decoder_closed_form(features, label, speed, theta),
      )

    values = jax.tree.leaves(laws(features, jnp.zeros(3, jnp.float32)))
    chex.assert_type([features, *values], jnp.float32)

  @parameterized.parameters(
      (0.5, jnp.float64),
      (1, jnp.float64),
      (np.float32(0.5), jnp.float32),
      (np.float64(0.5), jnp.float64),
  )
  def test_h_has_the_type_of_the_rate(self, eta_y, dtype):
    setting = dict(num_tokens=50, eta_y=jnp.asarray(eta_y))
    chex.assert_type(dynamics.h_discrete(3, **setting), dtype)
    chex.assert_type(dynamics.h_continuous(3.0, **setting), dtype)


class AttendedTest(Float64TestCase):

  def test_equals_softmax_over_positions(self):
    attn_logits = np.random.default_rng(0).normal(size=4)
    sequence = np.array([0, 2, 2, 3, 2, 0])
    expected = np.bincount(sequence, _softmax(attn_logits[sequence]))
    actual = dynamics.attended(
        jnp.bincount(jnp.asarray(sequence)), jnp.asarray(attn_logits)
    )
    chex.assert_trees_all_close(actual, expected, atol=_ATOL)

  def test_absent_tokens_change_neither_value_nor_gradient(self):
    weights = jnp.array([1.0, 2.0, 0.0, 3.0])

    def first_share(attn_logits):
      return dynamics.attended(weights, attn_logits)[0]

    near = jnp.array([0.1, -0.2, 0.0, 0.3])
    far = near.at[2].set(1e4)
    slope = jax.jit(jax.value_and_grad(first_share))
    chex.assert_trees_all_equal(slope(near), slope(far))
    self.assertEqual(slope(far)[1][2], 0)

  def test_large_logits_do_not_overflow_in_float32(self):
    share = dynamics.attended(
        jnp.ones(2, jnp.float32), jnp.array([1000.0, 999.0], jnp.float32)
    )
    chex.assert_type(share, jnp.float32)
    chex.assert_trees_all_close(
        share, _softmax(np.array([1.0, 0.0])), atol=_ATOL_32
    )

  def test_empty_context_has_zero_features_and_finite_gradient(self):
    def length(attn_logits):
      return dynamics.l2_normalize(
          dynamics.attended(jnp.zeros(3), attn_logits)
      ).sum()

    value, gradient = jax.jit(jax.value_and_grad(length))(jnp.ones(3))
    self.assertEqual(value, 0)
    chex.assert_trees_all_equal(gradient, jnp.zeros(3))


class Lemma1Test(Float64TestCase):

  def setUp(self):
    super().setUp()
    generator = np.random.default_rng(1)
    self.decoder, self.attn_logits = jnp.asarray(
        generator.normal(size=(2, 6, 6))
    )
    self.counts = jnp.array([3, 0, 1, 2, 0, 0])

  def test_equals_gradient_of_the_log_likelihood(self):
    def log_likelihood(decoder, attn_logits):
      scores = self.counts * jnp.exp(attn_logits[4])
      logits = (scores / jnp.linalg.norm(scores)) @ decoder
      return jax.nn.log_softmax(logits)[5]

    expected = jax.jit(jax.grad(log_likelihood, argnums=(0, 1)))(
        self.decoder, self.attn_logits
    )
    actual = dynamics.lemma1_gradients(
        self.decoder, self.attn_logits, self.counts, 4, 5
    )
    chex.assert_trees_all_close(actual, expected, atol=_ATOL)

  def test_rows_sum_to_zero_and_only_the_query_row_of_z_moves(self):
    dy, dz = dynamics.lemma1_gradients(
        self.decoder, self.attn_logits, self.counts, 4, 5
    )
    chex.assert_trees_all_close(dy.sum(axis=1), jnp.zeros(6), atol=_ATOL)
    chex.assert_trees_all_close(dz.sum(axis=1), jnp.zeros(6), atol=_ATOL)
    chex.assert_trees_all_equal(dz.at[4].set(0), jnp.zeros((6, 6)))

  def test_float32_agrees_with_float64(self):
    expected = dynamics.lemma1_gradients(
        self.decoder, self.attn_logits, self.counts, 4, 5
    )
    actual = dynamics.lemma1_gradients(
        self.decoder.astype(jnp.float32),
        self.attn_logits.astype(jnp.float32),
        self.counts,
        4,
        5,
    )
    chex.assert_type(actual, jnp.float32)
    chex.assert_trees_all_close(actual, expected, atol=_ATOL_32)


class Lemma2Test(parameterized.TestCase):

  def test_bound_is_hoeffdings(self):
    # ln(2/delta) = 4 and 2 (T - 1) = 100.
    bound = dynamics.frequency_bound(51, 2 * np.exp(-4.0))
    self.assertAlmostEqual(bound, 0.2, places=12)

  @parameterized.parameters((1, 0.5), (10, 0.0), (10, 1.0))
  def test_out_of_range_arguments_raise(self, seq_len, delta):
    with self.assertRaisesRegex(ValueError, "seq_len"):
      dynamics.frequency_bound(seq_len, delta)


class Lemma3Test(Float64TestCase):

  def setUp(self):
    super().setUp()
    probs, query = _two_queries()
    self.features = jax.jit(dynamics.class_features)(
        probs, jnp.zeros((8, 8)), query
    )

  def test_decorrelation_solves_its_definition(self):
    prime = jax.jit(dynamics.decorrelation)(self.features)
    gram = self.features @ self.features.T
    chex.assert_trees_all_close(
        (jnp.eye(4) - prime) @ gram, jnp.eye(4), atol=_ATOL
    )
    self.assertTrue((jnp.diagonal(prime) < 0).all())

  def test_modified_update_moves_one_row_of_w(self):
    decoder = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)))
    dy = jax.jit(dynamics.modified_decoder_gradient)(
        decoder, self.features, 2, 7
    )
    error = np.eye(8)[7] - _softmax(np.asarray(self.features[2] @ decoder))
    chex.assert_trees_all_close(
        self.features @ dy, jnp.zeros((4, 8)).at[2].set(error), atol=_ATOL
    )


class Lemma5Test(Float64TestCase):

  def test_projected_decoder_and_error_follow_the_softmax_decoder(self):
    num_tokens, eta_y, logits = 7, 0.9, np.zeros(7)
    h = dynamics.h_discrete(20, num_tokens=num_tokens, eta_y=eta_y)
    chex.assert_shape(h, (21,))
    for s in range(21):
      error = np.eye(7)[3] - _softmax(logits)
      label = jnp.array([3])
      projected = dynamics.projected_decoder(h[s], label, num_tokens)[0]
      chex.assert_trees_all_close(projected, logits, atol=_ATOL)
      actual = dynamics.prediction_error(h[s], label, num_tokens)[0]
      chex.assert_trees_all_close(actual, error, atol=_ATOL)
      logits += eta_y * error

  def test_first_step_is_eta_over_m(self):
    h = dynamics.h_discrete(1, num_tokens=1000, eta_y=0.3)
    chex.assert_trees_all_close(h, jnp.array([0, 0.3 / 1000]), atol=_ATOL)

  def test_float32_agrees_with_float64(self):
    expected = dynamics.h_discrete(400, num_tokens=1000, eta_y=1.0)
    with jax.enable_x64(False):
      actual = dynamics.h_discrete(400, num_tokens=1000, eta_y=1.0)
      chex.assert_type(actual, jnp.float32)
    np.testing.assert_allclose(actual, expected, rtol=_ATOL_32)


class Lemma6Test(Float64TestCase):

  @parameterized.parameters(2, 100, 10_000, 1_000_000)
  def test_h_solves_the_equation_from_tiny_to_huge_times(self, num_tokens):
    times = jnp.logspace(-8, 12, 201)
    h = dynamics.h_continuous(times, num_tokens=num_tokens, eta_y=0.7)
    x, y = num_tokens * h, num_tokens * 0.7 * times
    left = jnp.expm1(x) + (num_tokens - 1) * x
    # x up to 40 in the exponent: forty roundings, doubled.
    np.testing.assert_allclose(left, y, rtol=2e-14)

  @parameterized.parameters(2, 100, 10_000, 1_000_000)
  def test_float32_agrees_with_float64(self, num_tokens):
    times = jnp.logspace(-8, 12, 201)
    expected = dynamics.h_continuous(times, num_tokens=num_tokens, eta_y=0.7)
    actual = dynamics.h_continuous(
        times.astype(jnp.float32), num_tokens=num_tokens, eta_y=0.7
    )
    chex.assert_type(actual, jnp.float32)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)

  def test_derivative_is_the_continuous_recursion(self):
    h = lambda t: dynamics.h_continuous(t, num_tokens=100, eta_y=0.7)
    value, slope = jax.value_and_grad(h)(jnp.asarray(9.0))
    self.assertAlmostEqual(slope, 0.7 / (99 + np.exp(100 * value)), places=12)

  def test_h_starts_at_zero(self):
    self.assertEqual(dynamics.h_continuous(0.0, num_tokens=9, eta_y=1.0), 0)


class Lemma7Test(Float64TestCase):

  @parameterized.product(num_tokens=(50, 1000), eta_y=(0.1, 1.0, 2.0))
  def test_discrete_and_continuous_h_stay_within_the_bound(
      self, num_tokens, eta_y
  ):
    setting = dict(num_tokens=num_tokens, eta_y=eta_y)
    gap = dynamics.h_discrete(300, **setting) - dynamics.h_continuous(
        jnp.arange(301.0), **setting
    )
    self.assertGreaterEqual(gap.min(), -_ATOL)
    self.assertLessEqual(gap.max(), dynamics.h_gap_bound(**setting))

  def test_bound_is_two_eta_over_m(self):
    self.assertEqual(dynamics.h_gap_bound(num_tokens=100, eta_y=0.5), 0.01)


class Lemma8Test(Float64TestCase):

  @parameterized.parameters(4, 30, 1000, 10_000)
  def test_omega_solves_its_equation(self, num_tokens):
    u = (1 + dynamics.omega_1(num_tokens)) * np.log(num_tokens)
    self.assertAlmostEqual(u, np.log((num_tokens - 1) * u), places=12)
    self.assertGreater(u, 1)

  def test_omega_needs_four_tokens(self):
    with self.assertRaisesRegex(ValueError, "got 3"):
      dynamics.omega_1(3)

  def test_phases_end_and_start_when_figure_3_says(self):
    # K ln M / eta = 20 ln 1000, and twice (1 + omega_1) = 1.31980 of it.
    run = dynamics.Run(num_tokens=1000, num_classes=10, eta_y=0.5)
    self.assertAlmostEqual(dynamics.scanning_end(run), 138.155105580, places=8)
    self.assertAlmostEqual(dynamics.snapping_start(run), 364.67530868, places=8)

  def test_exponential_term_takes_over_between_the_phases(self):
    run = dynamics.Run(num_tokens=1000, num_classes=10, eta_y=0.5)
    ends = [dynamics.scanning_end(run), dynamics.snapping_start(run)]
    x = 1000 * dynamics.h_continuous(
        jnp.array(ends) / 10, num_tokens=1000, eta_y=0.5
    )
    self.assertLess(jnp.exp(x[0]), 999)
    self.assertGreater(jnp.exp(x[1]), 999 * x[1])

  def test_first_phase_starts_soon_after_zero(self):
    # e^x <= (M - 1) x holds from t = .00100 K / eta_y on, and not at t = 0.
    times = jnp.array([0.0, 0.000995, 0.001005])
    x = 1000 * dynamics.h_continuous(times, num_tokens=1000, eta_y=1.0)
    self.assertSequenceEqual(
        (jnp.exp(x) <= 999 * x).tolist(), [False, False, True]
    )

  def test_figure_9_rounds_omega(self):
    run = dynamics.Run(num_tokens=100, num_classes=1, eta_y=10.0, eta_z=1.0)
    self.assertAlmostEqual(1 + dynamics.omega_1(100), 1.403, delta=5e-4)
    height = dynamics.gain_exponent(dynamics.snapping_start(run), run)
    self.assertAlmostEqual(height, 0.556, delta=5e-4)


class GammaTest(Float64TestCase):

  def test_equals_its_definition(self):
    run = dynamics.Run(num_tokens=50, num_classes=4, eta_y=0.3)
    times = jnp.geomspace(0.1, 1e4, 40)
    h = dynamics.h_continuous(times / 4, num_tokens=50, eta_y=0.3)
    expected = 49**2 * h / (49 + jnp.exp(50 * h))
    chex.assert_trees_all_close(
        dynamics.gamma(times, run), expected, atol=_ATOL
    )

  @parameterized.parameters((100, 2.602), (1000, 4.416), (10_000, 6.360))
  def test_peak_height_depends_on_m_alone(self, num_tokens, height):
    for num_classes, eta_y in ((1, 5.0), (10, 0.5)):
      run = dynamics.Run(
          num_tokens=num_tokens, num_classes=num_classes, eta_y=eta_y
      )
      time, peak = dynamics.gamma_peak(run)
      self.assertAlmostEqual(peak, height, delta=5e-4)
      around = dynamics.gamma(time * jnp.array([0.99, 1.0, 1.01]), run)
      self.assertAlmostEqual(around[1], peak, places=12)
      self.assertLess(around[0], peak)
      self.assertLess(around[2], peak)

  def test_leading_orders_are_approached(self):
    run = dynamics.Run(num_tokens=1000, num_classes=10, eta_y=0.5)
    early = dynamics.gamma(1e-3, run) / dynamics.gamma_early(1e-3, run)
    late = dynamics.gamma(1e20, run) / dynamics.gamma_late(1e20, run)
    self.assertAlmostEqual(early, 1, delta=1e-6)
    self.assertAlmostEqual(late, 1, delta=1e-6)

  def test_rates_can_be_mapped_over(self):
    def speed(eta_y):
      run = dynamics.Run(num_tokens=100, num_classes=2, eta_y=eta_y)
      return dynamics.gamma(3.0, run)

    actual = jax.vmap(speed)(jnp.array([0.5, 1.0]))
    expected = jnp.stack([speed(0.5), speed(1.0)])
    chex.assert_trees_all_close(actual, expected, atol=_ATOL)


class Theorem1Test(Float64TestCase):

  def setUp(self):
    super().setUp()
    probs, query = _two_queries()
    self.features = jax.jit(dynamics.class_features)(
        probs, jnp.zeros((8, 8)), query
    )

  def test_gradient_is_gamma_times_the_dual_features(self):
    # iota f - sum beta f' is F (I + E)^{-1}: a column of the pseudo-inverse.
    chex.assert_trees_all_close(
        jax.jit(dynamics.backpropagated_gradient)(self.features, 0.7),
        0.7 * np.linalg.pinv(self.features).T,
        atol=1e-10,
    )

  def test_pressure_is_positive_and_minus_the_diagonal_of_e_prime(self):
    gram = np.asarray(self.features @ self.features.T)
    diagonal = 1 - np.diagonal(np.linalg.inv(gram))
    xi = jax.jit(dynamics.xi)(self.features, 0.7)
    np.testing.assert_allclose(xi, -0.7 * diagonal, rtol=1e-10)
    self.assertTrue((xi > 0).all())

  def test_classes_without_overlap_feel_no_pressure(self):
    xi = jax.jit(dynamics.xi)(jnp.eye(3, 8), 0.7)
    chex.assert_trees_all_close(xi, jnp.zeros(3), atol=_ATOL)


class Lemma4Test(Float64TestCase):

  def test_velocity_equals_the_sum_over_components(self):
    probs, query = _two_queries()
    f = _unit(np.asarray(probs))
    beta = -np.linalg.inv(f @ f.T)
    expected = np.zeros((8, 8))
    for n in range(4):
      for other in set(range(4)) - {n}:
        push = (f[n] @ f[other]) * f[n] - f[other]
        expected[query[n]] += 0.7 * 0.3 * f[n] * beta[n, other] * push
    actual = jax.jit(dynamics.attention_velocity)(f, query, 0.7, 0.3)
    chex.assert_trees_all_close(actual, expected, atol=1e-10)
    chex.assert_trees_all_close(actual.sum(axis=1), jnp.zeros(8), atol=_ATOL)


class Theorem2Test(Float64TestCase):

  def test_distinct_tokens_gain_and_the_common_token_loses(self):
    features = dynamics.l2_normalize(_one_common_token())
    query = np.zeros(3, int)
    velocity = jax.jit(dynamics.attention_velocity)(features, query, 1.0)[0]
    distinct = jax.jit(dynamics.distinct_velocity)(features, 1.0)
    common = jax.jit(dynamics.common_velocity)(features, 1.0)[:, 0].sum()
    # f^2 = 1/1.3 for the common token, f.f' = 1/1.3 and E'_nn = -2.0202.
    self.assertAlmostEqual(velocity[0], -1.3986013986013994, places=12)
    self.assertAlmostEqual(common, -1.3986013986013994, places=12)
    self.assertAlmostEqual(distinct[0, 1], 0.01554001554001554, places=12)
    for n in range(3):
      own = slice(1 + 4 * n, 5 + 4 * n)
      chex.assert_trees_all_close(distinct[n, own], velocity[own], atol=_ATOL)
    self.assertTrue((velocity[1:] > 0).all())


class Theorem3Test(Float64TestCase):

  def test_gain_of_the_initial_probabilities(self):
    probs = _one_common_token()[0]
    self.assertAlmostEqual(dynamics.relative_gain(probs, 4, 1), 15, places=10)

  def test_gain_grows_by_chi_along_the_attention_flow(self):
    probs, start = _one_common_token(), jnp.zeros((13, 13))
    attn_logits, exponent = flow.integrate_attention(
        jnp.linspace(0.0, 3.0, 4),
        *(start, probs, jnp.zeros(3, int)),
        gamma=lambda t: 1 + t,
        eta_z=0.5,
    )
    z = attn_logits[:, 0]
    gain = dynamics.relative_gain(probs[:1] * jnp.exp(z), 4, 2)
    chi = dynamics.gain_growth(z[:, 4], z[0, 4])
    np.testing.assert_allclose(gain, gain[0] * chi, rtol=_ATOL_FLOW)
    feature = dynamics.l2_normalize(probs)[0, 4]
    lower, upper = dynamics.gain_growth_bounds(feature, exponent[:, 0])
    self.assertTrue((lower[1:] < chi[1:]).all())
    self.assertTrue((chi[1:] < upper[1:]).all())

  def test_bounds_are_exponentials_of_the_exponent(self):
    lower, upper = dynamics.gain_growth_bounds(0.5, jnp.array([0.0, 2.0]))
    np.testing.assert_allclose(lower, [1, np.e], rtol=_ATOL)
    np.testing.assert_allclose(upper, [1, np.exp(4)], rtol=_ATOL)


class StochasticTest(parameterized.TestCase):
  """Syn-Small by SGD, as in the experiments; values in docs/theory.md."""

  def setUp(self):
    super().setUp()
    probs = np.zeros((2, 34))
    probs[:, :10] = 1
    probs[0, 10:20] = probs[1, 20:30] = np.linspace(0.1, 1, 10)
    self.probs = probs / probs.sum(axis=1, keepdims=True)

  def _train(self, seed, eta_y, eta_z, momentum):
    """Takes 100 steps of batch 128, T = 128; returns row 0 of Z."""
    generator = np.random.default_rng(seed)
    decoder, attn_logits = np.zeros((34, 34)), np.zeros((2, 34))
    dy, dz = np.zeros((34, 34)), np.zeros((2, 34))
    for _ in range(100):
      n = generator.integers(2, size=128)
      counts = generator.multinomial(127, self.probs[n])
      f = _unit(counts * np.exp(attn_logits[n]))
      error = np.eye(34)[32 + n] - _softmax(f @ decoder)
      g = error @ decoder.T
      dy = momentum * dy + f.T @ error / 128
      dz = momentum * dz
      along = np.sum(f * g, axis=1, keepdims=True)
      np.add.at(dz, n, f * (g - f * along) / 128)
      decoder += eta_y * dy
      attn_logits += eta_z * dz
    return attn_logits[0]

  @parameterized.parameters(
      (1.0, 1.0, 0.0, [0.427, 0.194, 0.032]),
      (1.0, 1.0, 0.9, [0.628, 0.387, 0.036]),
      (10.0, 1.0, 0.0, [0.115, 0.068, 0.005]),
      (10.0, 1.0, 0.9, [0.232, 0.132, 0.008]),
      (1.0, 0.1, 0.0, [0.033, 0.004, 0.004]),
      (1.0, 0.1, 0.9, [0.070, 0.021, 0.005]),
  )
  def test_gain_departs_from_chi_as_rates_grow(
      self, eta_y, eta_z, momentum, expected
  ):
    z = np.stack([self._train(s, eta_y, eta_z, momentum) for s in range(4)])
    others = np.array([18, 15, 10])  # Of ranks 2, 5 and 10.
    weights = self.probs[0] * np.exp(z)
    gain = (weights[:, 19:20] / weights[:, others]) ** 2 - 1
    initial = (self.probs[0, 19] / self.probs[0, others]) ** 2 - 1
    error = np.abs(gain / (initial * np.exp(2 * z[:, 19:20])) - 1)
    np.testing.assert_allclose(error.max(axis=0), expected, atol=5e-4)

  @parameterized.parameters((0.1, 0.01, 0.9, 0.118), (1.0, 0.1, 0.0, 0.148))
  def test_momentum_has_not_reached_the_tenfold_rate(
      self, eta_y, eta_z, momentum, expected
  ):
    z = [self._train(s, eta_y, eta_z, momentum)[19] for s in range(4)]
    self.assertAlmostEqual(np.mean(z), expected, delta=5e-4)


class Theorem4Test(Float64TestCase):

  @parameterized.parameters(
      (0.5, 45.2, 2046),
      (1.0, 34.7, 1205),
      (2.0, 26.3, 691),
      (5.0, 18.0, 324),
  )
  def test_heights_of_figure_3_by_either_reading(self, eta_y, chi, normalizer):
    run = dynamics.Run(num_tokens=1000, num_classes=10, eta_y=eta_y, eta_z=0.5)
    exponent = dynamics.gain_exponent(700.0, run)
    _, upper = dynamics.gain_growth_bounds(1.0, exponent)
    self.assertAlmostEqual(upper, chi, delta=0.05)
    times = jnp.linspace(0.0, 700.0, 7001)
    area = jnp.trapezoid(dynamics.gamma(times, run), times)
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
    run = dynamics.Run(
        num_tokens=1000, num_classes=10, eta_y=1.0, eta_z=0.5, c0=c0
    )
    self.assertAlmostEqual(
        dynamics.gain_exponent(time, run), expected, delta=_ATOL_FLOW
    )

  def test_printed_form_does_not_start_at_zero(self):
    run = dynamics.Run(
        num_tokens=1000, num_classes=10, eta_y=1.0, eta_z=0.5, c0=0.2
    )
    self.assertEqual(dynamics.gain_exponent(0.0, run), 0)
    printed = dynamics.gain_exponent_as_printed(jnp.array([0.0, 10.0]), run)
    np.testing.assert_allclose(
        printed, [np.log(0.2) / 4, 0.5797548957], rtol=_ATOL_FLOW
    )

  def test_leading_orders_are_approached_from_above(self):
    run = dynamics.Run(
        num_tokens=1000, num_classes=10, eta_y=1.0, eta_z=0.5, c0=0.2
    )
    times = jnp.geomspace(1e-3, 1e30, 100)
    exponent = dynamics.gain_exponent(times, run)
    scanning = dynamics.scanning_exponent(times, run)
    snapping = dynamics.snapping_exponent(times, run)
    self.assertTrue((scanning >= exponent).all())
    self.assertTrue((snapping >= exponent).all())
    self.assertAlmostEqual(scanning[0] / exponent[0], 1, delta=1e-3)
    self.assertAlmostEqual(snapping[-1], exponent[-1], delta=1e-12)


class Corollary1Test(Float64TestCase):

  def test_error_is_reached_within_the_bound_and_not_much_before(self):
    run = dynamics.Run(num_tokens=200, num_classes=3, eta_y=0.5)
    for epsilon in (0.1, 0.01):
      bound = dynamics.num_steps_bound(epsilon, run)
      seen = jnp.array([0.9, 1.0]) * bound / 3
      h = dynamics.h_continuous(seen, num_tokens=200, eta_y=0.5)
      error = dynamics.prediction_error(h, jnp.zeros(2, int), 200)
      norm = jnp.linalg.norm(error, axis=1)
      self.assertLessEqual(norm[1], epsilon)
      self.assertGreater(norm[0], epsilon)

  def test_non_positive_epsilon_raises(self):
    run = dynamics.Run(num_tokens=200, num_classes=3, eta_y=0.5)
    with self.assertRaisesRegex(ValueError, "got 0.0"):
      dynamics.num_steps_bound(0.0, run)


class Corollary2Test(Float64TestCase):

  def test_every_common_token_of_symmetric_classes_loses(self):
    probs = np.zeros((3, 11))
    probs[:, :2] = [0.3, 0.1]
    for n in range(3):
      probs[n, 2 + 3 * n : 5 + 3 * n] = np.roll([0.1, 0.2, 0.3], n)
    features, query = _unit(probs), np.zeros(3, int)
    expected = jax.jit(dynamics.attention_velocity)(features, query, 1.0)
    actual = jax.jit(dynamics.symmetric_common_velocity)(features, 1.0)
    chex.assert_trees_all_close(actual[:2], expected[0, :2], atol=_ATOL)
    self.assertTrue((actual[:2] < 0).all())

  def test_a_single_class_raises(self):
    with self.assertRaisesRegex(ValueError, r"features \(1, 8\)"):
      dynamics.symmetric_common_velocity(jnp.eye(1, 8), 1.0)


class Theorem5Test(Float64TestCase):

  def test_features_read_the_logits_of_their_own_class(self):
    probs, query = _two_queries()
    features = jax.jit(dynamics.class_features)(probs, np.zeros((8, 8)), query)
    label, theta = jnp.arange(4), jnp.array([0.1, -0.1, 0.0, 0.2])
    decoder = jax.jit(dynamics.decoder_closed_form)(features, label, 0.3, theta)
    expected = (1 + theta)[:, None] * dynamics.projected_decoder(0.3, label, 8)
    chex.assert_trees_all_close(features @ decoder, expected, atol=1e-10)

  def test_theta_bound(self):
    # K / sqrt(N) = 4 / 20 and ln(K / delta) = 4.
    bound = dynamics.theta_bound(400, 4, 4 * np.exp(-4.0))
    self.assertAlmostEqual(bound, 0.4, places=12)

  @parameterized.parameters((0, 4, 0.5), (9, 0, 0.5), (9, 4, 0.0), (9, 4, 1.0))
  def test_out_of_range_arguments_raise(self, num_steps, num_classes, delta):
    with self.assertRaisesRegex(ValueError, f"{delta=}"):
      dynamics.theta_bound(num_steps, num_classes, delta)


class FlowTest(Float64TestCase):

  def setUp(self):
    super().setUp()
    self.probs, self.query = _two_queries()
    self.label = jnp.arange(4)
    self.weights = jnp.array([0.1, 0.2, 0.3, 0.4])

  def _runge_kutta(self, velocity, state, end, num_steps):
    """Integrates to `end` in steps of order 4."""
    size = end / num_steps
    for _ in range(num_steps):
      k1 = velocity(state)
      k2 = velocity(state + size / 2 * k1)
      k3 = velocity(state + size / 2 * k2)
      k4 = velocity(state + size * k3)
      state = state + size / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return state

  @parameterized.parameters(
      # Runge-Kutta's own error; a hundred float32 roundings of |Y| up to 3.
      (jnp.float64, 1e-7),
      (jnp.float32, 1e-4),
  )
  def test_flow_averages_lemma_1_over_classes(self, dtype, atol):
    eta_y, eta_z = 2.0, 0.5
    probs, query = np.asarray(self.probs), np.asarray(self.query)

    def velocity(state):
      decoder, attn_logits = state
      f = _unit(probs * np.exp(attn_logits[query]))
      error = np.asarray(self.weights)[:, None] * (
          np.eye(8)[:4] - _softmax(f @ decoder)
      )
      g = error @ decoder.T
      dz = np.zeros((8, 8))
      np.add.at(dz, query, f * (g - f * np.sum(f * g, axis=1, keepdims=True)))
      return np.stack([eta_y * f.T @ error, eta_z * dz])

    expected = self._runge_kutta(velocity, np.zeros((2, 8, 8)), 8.0, 160)
    decoder, attn_logits = flow.integrate(
        jnp.array([0.0, 4.0, 8.0], dtype),
        *(jnp.zeros((8, 8), dtype), jnp.zeros((8, 8), dtype)),
        *(self.probs.astype(dtype), self.query, self.label),
        eta_y=eta_y,
        eta_z=eta_z,
        class_weights=self.weights.astype(dtype),
    )
    chex.assert_type([decoder, attn_logits], dtype)
    chex.assert_shape([decoder, attn_logits], (3, 8, 8))
    chex.assert_trees_all_close(
        np.stack([decoder[-1], attn_logits[-1]]), expected, atol=atol
    )

  def test_flow_with_momentum_is_the_limit_of_small_momentum_steps(self):
    # Steps of size s: v += s (g - (1 - mu) v), x -= s eta v. In terms of
    # u = v / s that is momentum 1 - s (1 - mu) at the rate s^2 eta.
    eta, momentum, end = 0.7, 0.8, 10
    arguments = (self.probs, self.query, self.label)
    slope = jax.grad(flow.expected_loss, argnums=(0, 1))

    def steps_of(size):
      optimizer = optax.sgd(size**2 * eta, 1 - size * (1 - momentum))
      state = (jnp.zeros((8, 8)), jnp.zeros((8, 8)))

      def step(carry, _):
        state, opt_state = carry
        grads = slope(*state, *arguments, self.weights)
        updates, opt_state = optimizer.update(grads, opt_state)
        return (optax.apply_updates(state, updates), opt_state), None

      carry = (state, optimizer.init(state))
      (state, _), _ = jax.lax.scan(step, carry, None, round(end / size))
      return state

    path = flow.integrate(
        jnp.array([0.0, end]),
        *(jnp.zeros((8, 8)), jnp.zeros((8, 8))),
        *arguments,
        eta_y=eta,
        eta_z=eta,
        momentum=momentum,
        class_weights=self.weights,
    )
    limit = jax.tree.map(lambda leaf: leaf[-1], path)
    error = lambda state: max(
        float(jnp.abs(a - b).max()) for a, b in zip(state, limit, strict=True)
    )
    coarse, fine = error(steps_of(0.02)), error(steps_of(0.01))
    self.assertLess(fine, 0.01)  # Of entries up to 2.
    # First order: half the step, half the error.
    np.testing.assert_allclose(coarse / fine, 2, rtol=0.05)

  def test_attention_flow_follows_lemma_4_and_counts_the_pressure(self):
    start = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)))

    @jax.jit
    def slopes(attn_logits):
      features = dynamics.class_features(self.probs, attn_logits, self.query)
      dz = dynamics.attention_velocity(features, self.query, 2.0, 0.01)
      return dz, 0.01 * dynamics.xi(features, 2.0)

    expected = self._runge_kutta(lambda z: slopes(z)[0], start, 8.0, 40)
    attn_logits, exponent = flow.integrate_attention(
        jnp.array([0.0, 1e-5, 8.0]),
        *(start, self.probs, self.query),
        gamma=lambda t: 2.0 + 0 * t,
        eta_z=0.01,
    )
    chex.assert_trees_all_close(attn_logits[-1], expected, atol=1e-7)
    # B_n starts as eta_z xi_n t.
    np.testing.assert_allclose(exponent[1], 1e-5 * slopes(start)[1], rtol=1e-4)

  def test_loss_at_zero_is_log_of_the_number_of_tokens(self):
    zeros = jnp.zeros((8, 8))
    loss = jax.jit(flow.expected_loss)(
        *(zeros, zeros, self.probs, self.query, self.label, self.weights)
    )
    self.assertAlmostEqual(loss, np.log(8), places=12)

  def test_classes_weigh_the_same_by_default(self):
    times, zeros = jnp.array([0.0, 1e-3]), jnp.zeros((8, 8))
    decoder, _ = flow.integrate(
        *(times, zeros, zeros, self.probs, self.query, self.label),
        eta_y=2.0,
        eta_z=0.0,
    )
    f, error = _unit(np.asarray(self.probs)), np.eye(8)[:4] - 1 / 8
    expected = 1e-3 * 2.0 / 4 * f.T @ error
    np.testing.assert_allclose(decoder[1], expected, atol=1e-6)


if __name__ == "__main__":
  absltest.main()
