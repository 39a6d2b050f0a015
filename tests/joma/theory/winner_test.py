import math

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.theory import dynamics
from joma.theory import flow
from joma.theory import winner
from tests.scansnap_jax.theorems import float64

_ATOL = 1e-12
# Along an integrated path: ten times the largest error seen.
_ATOL_FLOW = 1e-9
_DELTA = (1.0, -0.8, 0.5, 0.1)


def _one_node(attention, delta, *, temperature=1.0, logits=0.0, v=0.0):
  """A block with K = 1 and phi = identity in which E[g x] = delta."""
  num_tokens = len(delta)
  batch = dynamics.Batch(
      jnp.eye(num_tokens),
      jnp.zeros(num_tokens, int),
      jnp.eye(num_tokens),
      jnp.zeros((num_tokens, 1)),
  )
  params = dynamics.Params(
      jnp.full((num_tokens, 1), v), jnp.full((1, num_tokens), logits)
  )
  block = dynamics.Block(
      attention=attention, temperature=temperature, has_residual=False
  )
  loss = lambda hidden, upper: -delta @ hidden[:, 0]
  return params, batch, block, loss


class ErfTest(float64.TestCase):

  @parameterized.parameters((1.0, 1.0, 1.0), (2.0, 3.0, 0.5))
  @pytest.mark.slow
  def test_relation_holds_along_the_real_flow(self, temperature, eta_w, eta_z):
    delta = jnp.array(_DELTA)
    sharpness = math.sqrt(eta_z / eta_w) / temperature
    end = 0.98 * winner.blow_up_time(delta, sharpness)
    times = jnp.linspace(0.0, end / eta_w, 4)
    path = flow.integrate(
        times,
        *_one_node("exp", delta, temperature=temperature),
        eta_w=eta_w,
        eta_z=eta_z,
    )
    v, reached = path.v[..., 0], math.sqrt(2 / math.pi) * sharpness
    ratio = winner.erf_ratio(v, delta, sharpness)
    expected = reached * jnp.outer(times * eta_w, jnp.ones(4))
    chex.assert_trees_all_close(ratio, expected, atol=_ATOL_FLOW)
    chex.assert_trees_all_close(ratio[-1], jnp.full(4, 0.98), atol=_ATOL_FLOW)
    closed = winner.components(times[-1] * eta_w, delta, sharpness)
    chex.assert_trees_all_close(closed, v[-1], atol=_ATOL_FLOW)
    velocity = winner.velocity(v[-1], delta, sharpness)
    chex.assert_trees_all_close(
        velocity,
        delta * jnp.exp(path.params.attn_logits[-1, 0] / temperature),
        rtol=_ATOL_FLOW,
    )

  def test_numbers_at_98_percent_of_blow_up(self):
    # Reference: an independent integration in NumPy.
    expected = [2.3263478734, 1.2372345992, 0.6588376927, 0.1231352477]
    delta = jnp.array([1.0, 0.8, 0.5, 0.1])
    v = winner.components(0.98 * math.sqrt(math.pi / 2), delta)
    np.testing.assert_allclose(v, expected, atol=1e-9)
    # With v / 2 in place of v / sqrt 2 the tokens disagree.
    halves = winner.erf_ratio(v / math.sqrt(2), delta)
    np.testing.assert_allclose(
        halves, [0.900025, 0.772935, 0.717381, 0.693839], atol=1e-6
    )


class BlowUpTest(float64.TestCase):

  @pytest.mark.slow
  def test_winner_is_infinite_at_the_time_and_others_freeze(self):
    delta = jnp.array(_DELTA)
    # At |v_w| = 9 the time left is 1e-19 of the whole.
    times, v = winner.integrate(jnp.linspace(0.0, 9.0, 10), delta)
    chex.assert_trees_all_close(
        times[-1], jnp.array(1.2533141373155001), atol=_ATOL_FLOW
    )
    chex.assert_trees_all_close(
        times[-1], winner.blow_up_time(delta), atol=_ATOL_FLOW
    )
    frozen = winner.frozen_components(delta)
    chex.assert_trees_all_close(v[-1, 1:], frozen[1:], atol=_ATOL_FLOW)
    np.testing.assert_allclose(
        frozen,
        [np.inf, -1.2815515655446006, 0.6744897501960818, 0.12566134685507405],
        atol=_ATOL,
    )
    chex.assert_trees_all_close(
        winner.erf_ratio(v, delta)[:, 1:],
        jnp.outer(math.sqrt(2 / math.pi) * times, jnp.ones(3)),
        atol=_ATOL_FLOW,
    )

  def test_time_and_limits_scale_with_sharpness(self):
    delta = jnp.array([-2.0, 0.5])
    self.assertAlmostEqual(
        float(winner.blow_up_time(delta, 3.0)), 1.2533141373155 / 6, places=12
    )
    chex.assert_trees_all_close(
        3 * winner.frozen_components(delta, 3.0)[1],
        winner.frozen_components(delta)[1],
        atol=_ATOL,
    )


class LinearAttentionTest(float64.TestCase):

  def test_closed_form_is_the_flow(self):
    delta, start = jnp.array(_DELTA), jnp.full(4, 0.3)
    params, *block = _one_node("linear", delta, v=0.3)
    times = jnp.array([0.0, 1.5])

    def both(attn_logits):
      moved = params._replace(attn_logits=attn_logits[None])
      path = flow.integrate(times, moved, *block)
      closed = winner.linear_components(1.5, delta, start, attn_logits)
      return closed, (path.v[-1, :, 0], path.params.attn_logits[-1, 0])

    # z > |v| throughout, z < 0, z < |v|, z = 0.
    signs = jnp.array([[0.5], [-0.5], [0.1], [0.0]])
    closed, flown = jax.jit(jax.vmap(both))(signs * jnp.ones((1, 4)))
    chex.assert_trees_all_close(closed, flown, atol=_ATOL_FLOW)

  def test_velocity_is_delta_times_the_root_while_logits_are_positive(self):
    delta, zeros = jnp.array(_DELTA), jnp.zeros(4)
    v_of = lambda t: winner.linear_components(t, delta, zeros, zeros + 0.2)[0]
    v, velocity = jax.jvp(v_of, (1.5,), (1.0,))
    chex.assert_trees_all_close(
        velocity, delta * jnp.sqrt(v**2 + 0.04), atol=_ATOL
    )

  def test_zero_is_a_fixed_point(self):
    v, attn_logits = winner.linear_components(
        3.0, jnp.array(_DELTA), jnp.zeros(4), jnp.zeros(4)
    )
    chex.assert_trees_all_equal((v, attn_logits), (jnp.zeros(4), jnp.zeros(4)))


class SoftmaxDirectionTest(float64.TestCase):

  @pytest.mark.slow
  def test_approaches_the_real_direction_in_fourth_order(self):
    # All samples share one context, so that only the drift of b-bar is left.
    delta = jnp.array([0.5, 0.3, -0.2, 0.4])
    context = jnp.array([0.1, 0.2, 0.3, 0.4])
    params, batch, block, _ = _one_node("softmax", delta)
    batch = batch._replace(counts=jnp.outer(jnp.ones(4), context))
    loss = lambda hidden, upper: -hidden[:, 0].mean()
    times = jnp.array([0.0, 0.2, 0.4])
    path = flow.integrate(times, params, batch, block, loss)
    errors = []
    for i in (1, 2):
      v = path.v[i, :, 0]
      direction = winner.softmax_direction(v, context, path.attended[0])
      gap = direction / direction.sum() - path.attended[i]
      errors.append(jnp.abs(gap).max())
    self.assertLess(errors[1], 1e-3)
    self.assertBetween(errors[1] / errors[0], 14.0, 18.0)


if __name__ == "__main__":
  absltest.main()
