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
from scansnap_jax.theorems import attention
from scansnap_jax.theorems import oracles
from tests.scansnap_jax.theorems import float64


class FloatTypeTest(float64.TestCase):

  @parameterized.parameters(True, False)
  def test_laws_of_time_keep_float32(self, is_python):
    rate = 0.5 if is_python else jnp.float32(0.5)
    run = growth.TheoryRun(num_tokens=50, num_classes=3, eta_y=rate, eta_z=0.1)
    for law in (
        growth.gamma,
        growth.gamma_early,
        growth.gamma_late,
        gains.gain_exponent,
        gains.gain_exponent_as_printed,
        gains.scanning_exponent,
        gains.snapping_exponent,
    ):
      value = jax.jit(law)(jnp.array([1.0, 9.0], jnp.float32), run)
      chex.assert_type(value, jnp.float32)

  def test_laws_of_features_keep_float32(self):
    probs = jnp.asarray(attention.one_common()).astype(jnp.float32)
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
          gains.relative_gain(features, 4, 1),
          gains.gain_growth(features[0], 0.0),
          gains.gain_growth_bounds(0.5, features[0]),
          growth.decoder_closed_form(features, label, speed, theta),
      )

    values = jax.tree.leaves(laws(features, jnp.zeros(3, jnp.float32)))
    chex.assert_type([features, *values], jnp.float32)

  @parameterized.parameters(
      (0.5, jnp.float64),
      (1, jnp.float64),
      (np.float32(0.5), jnp.float32),
      (np.float64(0.5), jnp.float64),
  )
  @pytest.mark.by_default(0, 1)
  def test_h_has_the_type_of_the_rate(self, eta_y, dtype):
    setting = dict(num_tokens=50, eta_y=jnp.asarray(eta_y))
    chex.assert_type(growth.h_discrete(3, **setting), dtype)
    chex.assert_type(growth.h_continuous(3.0, **setting), dtype)


class AttendedTest(float64.TestCase):

  def test_equals_softmax_over_positions(self):
    attn_logits = np.random.default_rng(0).normal(size=4)
    sequence = np.array([0, 2, 2, 3, 2, 0])
    expected = np.bincount(sequence, oracles.softmax(attn_logits[sequence]))
    actual = dynamics.attended(
        jnp.bincount(jnp.asarray(sequence)), jnp.asarray(attn_logits)
    )
    chex.assert_trees_all_close(actual, expected, atol=float64.ATOL)

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
        share, oracles.softmax(np.array([1.0, 0.0])), atol=float64.ATOL_32
    )

  def test_empty_context_has_zero_features_and_finite_gradient(self):
    def length(attn_logits):
      return dynamics.l2_normalize(
          dynamics.attended(jnp.zeros(3), attn_logits)
      ).sum()

    value, gradient = jax.jit(jax.value_and_grad(length))(jnp.ones(3))
    self.assertEqual(value, 0)
    chex.assert_trees_all_equal(gradient, jnp.zeros(3))


class Lemma1Test(float64.TestCase):

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
    chex.assert_trees_all_close(actual, expected, atol=float64.ATOL)

  def test_rows_sum_to_zero_and_only_the_query_row_of_z_moves(self):
    dy, dz = dynamics.lemma1_gradients(
        self.decoder, self.attn_logits, self.counts, 4, 5
    )
    chex.assert_trees_all_close(dy.sum(axis=1), jnp.zeros(6), atol=float64.ATOL)
    chex.assert_trees_all_close(dz.sum(axis=1), jnp.zeros(6), atol=float64.ATOL)
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
    chex.assert_trees_all_close(actual, expected, atol=float64.ATOL_32)


class Lemma2Test(parameterized.TestCase):

  def test_bound_is_hoeffdings(self):
    # ln(2/delta) = 4 and 2 (T - 1) = 100.
    bound = dynamics.frequency_bound(51, 2 * np.exp(-4.0))
    self.assertAlmostEqual(bound, 0.2, places=12)

  @parameterized.parameters((1, 0.5), (10, 0.0), (10, 1.0))
  def test_out_of_range_arguments_raise(self, seq_len, delta):
    with self.assertRaisesRegex(ValueError, "seq_len"):
      dynamics.frequency_bound(seq_len, delta)


class Lemma3Test(float64.TestCase):

  def setUp(self):
    super().setUp()
    probs, query = float64.two_queries()
    self.features = jax.jit(dynamics.class_features)(
        probs, jnp.zeros((8, 8)), query
    )

  def test_decorrelation_solves_its_definition(self):
    prime = jax.jit(dynamics.decorrelation)(self.features)
    gram = self.features @ self.features.T
    chex.assert_trees_all_close(
        (jnp.eye(4) - prime) @ gram, jnp.eye(4), atol=float64.ATOL
    )
    self.assertTrue((jnp.diagonal(prime) < 0).all())

  def test_modified_update_moves_one_row_of_w(self):
    decoder = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)))
    dy = jax.jit(dynamics.modified_decoder_gradient)(
        decoder, self.features, 2, 7
    )
    error = np.eye(8)[7] - oracles.softmax(
        np.asarray(self.features[2] @ decoder)
    )
    chex.assert_trees_all_close(
        self.features @ dy,
        jnp.zeros((4, 8)).at[2].set(error),
        atol=float64.ATOL,
    )


class Theorem1Test(float64.TestCase):

  def setUp(self):
    super().setUp()
    probs, query = float64.two_queries()
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
    chex.assert_trees_all_close(xi, jnp.zeros(3), atol=float64.ATOL)


class Lemma4Test(float64.TestCase):

  def test_velocity_equals_the_sum_over_components(self):
    probs, query = float64.two_queries()
    f = oracles.unit(np.asarray(probs))
    actual = jax.jit(dynamics.attention_velocity)(f, query, 0.7, 0.3)
    components = attention.component_velocity(
        np.asarray(probs), np.asarray(query)
    )
    expected = 0.7 * 0.3 * components
    chex.assert_trees_all_close(actual, expected, atol=1e-10)
    chex.assert_trees_all_close(
        actual.sum(axis=1), jnp.zeros(8), atol=float64.ATOL
    )


class Theorem2Test(float64.TestCase):

  @pytest.mark.slow
  def test_distinct_tokens_gain_and_the_common_token_loses(self):
    features = dynamics.l2_normalize(jnp.asarray(attention.one_common()))
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
      chex.assert_trees_all_close(
          distinct[n, own], velocity[own], atol=float64.ATOL
      )
    self.assertTrue((velocity[1:] > 0).all())


class Corollary2Test(float64.TestCase):

  def test_every_common_token_of_symmetric_classes_loses(self):
    features, query = oracles.unit(attention.two_common()), np.zeros(3, int)
    expected = jax.jit(dynamics.attention_velocity)(features, query, 1.0)
    actual = jax.jit(dynamics.symmetric_common_velocity)(features, 1.0)
    chex.assert_trees_all_close(actual[:2], expected[0, :2], atol=float64.ATOL)
    self.assertTrue((actual[:2] < 0).all())

  def test_a_single_class_raises(self):
    with self.assertRaisesRegex(ValueError, r"features \(1, 8\)"):
      dynamics.symmetric_common_velocity(jnp.eye(1, 8), 1.0)


if __name__ == "__main__":
  absltest.main()
