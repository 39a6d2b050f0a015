from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from scansnap_jax import dynamics
from scansnap_jax import flow
from scansnap_jax.theorems import oracles
from tests.scansnap_jax.theorems import float64


class FlowTest(float64.TestCase):

  def setUp(self):
    super().setUp()
    self.probs, self.query = float64.two_queries()
    self.label = jnp.arange(4)
    self.weights = jnp.array([0.1, 0.2, 0.3, 0.4])

  @parameterized.parameters(
      # Runge-Kutta's own error; a hundred float32 roundings of |Y| up to 3.
      (jnp.float64, 1e-7),
      (jnp.float32, 1e-4),
  )
  @pytest.mark.by_default(0)
  def test_flow_averages_lemma_1_over_classes(self, dtype, atol):
    eta_y, eta_z = 2.0, 0.5
    probs, query = np.asarray(self.probs), np.asarray(self.query)

    def velocity(state):
      decoder, attn_logits = state
      f = oracles.unit(probs * np.exp(attn_logits[query]))
      error = np.asarray(self.weights)[:, None] * (
          np.eye(8)[:4] - oracles.softmax(f @ decoder)
      )
      g = error @ decoder.T
      dz = np.zeros((8, 8))
      np.add.at(dz, query, f * (g - f * np.sum(f * g, axis=1, keepdims=True)))
      return np.stack([eta_y * f.T @ error, eta_z * dz])

    expected = oracles.rk4(
        velocity, np.zeros((2, 8, 8)), np.linspace(0.0, 8.0, 161)
    )[-1]
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

  @pytest.mark.slow
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

  @pytest.mark.slow
  def test_attention_flow_follows_lemma_4_and_counts_the_pressure(self):
    start = np.random.default_rng(0).normal(size=(8, 8))

    @jax.jit
    def slopes(attn_logits):
      features = dynamics.class_features(self.probs, attn_logits, self.query)
      dz = dynamics.attention_velocity(features, self.query, 2.0, 0.01)
      return dz, 0.01 * dynamics.xi(features, 2.0)

    expected = oracles.rk4(
        lambda z: np.asarray(slopes(z)[0]), start, np.linspace(0.0, 8.0, 41)
    )[-1]
    attn_logits, exponent = flow.integrate_attention(
        jnp.array([0.0, 1e-5, 8.0]),
        *(jnp.asarray(start), self.probs, self.query),
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

  @pytest.mark.slow
  def test_classes_weigh_the_same_by_default(self):
    times, zeros = jnp.array([0.0, 1e-3]), jnp.zeros((8, 8))
    decoder, _ = flow.integrate(
        *(times, zeros, zeros, self.probs, self.query, self.label),
        eta_y=2.0,
        eta_z=0.0,
    )
    f, error = oracles.unit(np.asarray(self.probs)), np.eye(8)[:4] - 1 / 8
    expected = 1e-3 * 2.0 / 4 * f.T @ error
    np.testing.assert_allclose(decoder[1], expected, atol=1e-6)


if __name__ == "__main__":
  absltest.main()
