from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax.numpy as jnp
import numpy as np
import pytest

from joma.theory import dynamics
from tests.joma import problems
from tests.scansnap_jax.theorems import float64

# A few hundred float64 roundings of numbers near 1.
_ATOL = 1e-12


class BlockTest(parameterized.TestCase):

  @parameterized.parameters(
      (dict(attention="cosine"), "cosine"),
      (dict(activation="tanh"), "activation='tanh' is none of"),
      (dict(temperature=0.0), "temperature must be positive, got 0.0"),
  )
  def test_unknown_kinds_are_refused(self, changes, message):
    # The type checker of the tests may come first.
    with self.assertRaisesRegex((ValueError, TypeError), message):
      dynamics.Block(**changes)


class AttendTest(float64.TestCase):

  @parameterized.parameters(
      ("linear", [[0.0, 2.0, -3.0]]),
      ("exp", [[0.0, 2 * np.e, 3 / np.e]]),
      (
          "softmax",
          [[
              0.0,
              2 * np.e / (2 * np.e + 3 / np.e),
              3 / np.e / (2 * np.e + 3 / np.e),
          ]],
      ),
  )
  def test_three_kinds_by_hand(self, attention, expected):
    attn_logits, counts = jnp.array([[7.0, 1, -1]]), jnp.array([[0, 2, 3]])
    b = dynamics.attend(attn_logits, counts, attention)
    chex.assert_trees_all_close(b, jnp.array(expected), atol=_ATOL)


class HiddenTest(float64.TestCase):

  @parameterized.parameters(True, False)
  def test_equals_the_equations_sample_by_sample(self, has_residual):
    batch, params = problems.make(3)
    block = dynamics.Block(
        attention="exp",
        activation="quadratic",
        temperature=0.7,
        has_residual=has_residual,
    )
    actual = problems.hidden(params, batch, block)
    for i, q in enumerate(np.asarray(batch.query)):
      b = np.exp(np.asarray(params.attn_logits)[q] / 0.7)
      f = np.asarray(batch.embedding) @ (b * np.asarray(batch.counts)[i])
      f = f + has_residual * np.asarray(batch.query_embedding)[:, q]
      expected = (np.asarray(params.lower).T @ f) ** 2 / 2
      np.testing.assert_allclose(actual[i], expected, atol=_ATOL)

  @pytest.mark.slow
  def test_activation_may_be_any_function(self):
    batch, params = problems.make(1)
    by_name, by_function = (
        problems.hidden(params, batch, dynamics.Block(activation=activation))
        for activation in ("relu", lambda h: (h + jnp.abs(h)) / 2)
    )
    chex.assert_trees_all_close(by_name, by_function, atol=_ATOL)


class ReducedVelocityTest(float64.TestCase):

  @parameterized.product(
      attention=("linear", "exp", "softmax"),
      activation=problems.ACTIVATIONS,
      has_residual=(True, False),
  )
  @pytest.mark.by_default(0, 1)
  def test_closed_form_equals_automatic_differentiation(
      self, attention, activation, has_residual
  ):
    batch, params = problems.make(3)
    loss, upper = problems.upper_loss()
    params = params._replace(upper=upper)
    block = dynamics.Block(
        attention=attention,
        activation=activation,
        temperature=0.7,
        has_residual=has_residual,
    )
    expected = problems.velocity(params, batch, block, loss)
    actual, _ = problems.reduced_velocity(
        problems.reduce(params, batch), batch, block, loss
    )
    chex.assert_trees_all_close(
        actual, problems.reduce(expected, batch), atol=_ATOL
    )
    self.assertGreater(jnp.abs(actual.attn_logits).min(axis=1).max(), 1e-4)

  def test_softmax_is_the_exp_law_less_the_shared_term(self):
    batch, params = problems.make(1)
    block = dynamics.Block(activation="silu", temperature=0.7)
    loss = problems.stationary_loss()
    state = problems.reduce(params, batch)
    velocity, shared = problems.reduced_velocity(state, batch, block, loss)
    followed = jnp.sum(state.v * velocity.v, axis=1) / 0.7
    chex.assert_trees_all_close(
        velocity.attn_logits[0], followed - shared[0], atol=_ATOL
    )

  def test_softmax_conserves_the_sum_of_logits(self):
    batch, params = problems.make(3)
    velocity = problems.velocity(
        *(params, batch, dynamics.Block(activation="gelu")),
        problems.stationary_loss(),
    )
    sums = velocity.attn_logits.sum(axis=1)
    chex.assert_trees_all_close(sums, jnp.zeros(3), atol=_ATOL)


if __name__ == "__main__":
  absltest.main()
