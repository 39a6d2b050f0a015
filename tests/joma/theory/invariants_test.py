import functools

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import pytest

from joma.theory import dynamics
from joma.theory import flow
from tests.joma import problems
from tests.scansnap_jax.theorems import float64

# Along an integrated path: ten times the largest error seen.
_RTOL_FLOW = 1e-8
_STEP_SIZES = (1e-2, 1e-3, 1e-4)
_TIME = 0.5


def _errors(attention, num_queries):
  """Relative errors of the law at the end [step sizes, activations]."""
  batch, params = problems.make(num_queries)
  loss = problems.stationary_loss()
  phis = [dynamics.ACTIVATIONS[name] for name in problems.ACTIVATIONS]

  def error(weights, step_size):
    # One program for all activations: the weights choose.
    mixture = lambda h: sum(
        w * phi(h) for w, phi in zip(weights, phis, strict=True)
    )
    path = flow.descend(
        params,
        batch,
        dynamics.Block(attention=attention, activation=mixture),
        loss,
        eta_w=step_size,
        eta_z=step_size,
        num_records=1,
        steps_per_record=jnp.round(_TIME / step_size).astype(int),
    )
    exact = dict(correction=path.correction) if attention == "softmax" else {}
    check = problems.check_invariant(
        path.params.attn_logits, path.v, attention=attention, **exact
    )
    return check.relative_error[-1]

  errors = jax.jit(jax.vmap(error, in_axes=(0, None)))
  return [errors(jnp.eye(len(phis)), step_size) for step_size in _STEP_SIZES]


class StepSizeTest(float64.TestCase):

  @parameterized.product(
      attention=("linear", "exp", "softmax"), num_queries=(1, 3)
  )
  @pytest.mark.by_default(0)
  def test_error_falls_linearly(self, attention, num_queries):
    errors = _errors(attention, num_queries)
    for i, activation in enumerate(problems.ACTIVATIONS):
      with self.subTest(activation):
        first, second, third = (float(e[i]) for e in errors)
        self.assertLess(first, 0.01)
        # 10, but for the second order in the step. A large step may also jump
        # over the kink of ReLU.
        slack = 4.0 if activation == "relu" else 0.3
        self.assertBetween(first / second, 10 - slack, 10 + slack)
        self.assertBetween(second / third, 9.9, 10.1)


@functools.cache
def _path(attention):
  """Integrates three queries below a layer that trains as well."""
  batch, params = problems.make(3)
  loss, upper = problems.upper_loss()
  block = dynamics.Block(
      attention=attention, activation="silu", temperature=0.6
  )
  return flow.integrate(
      jnp.linspace(0.0, 1.0, 5),
      *(params._replace(upper=upper), batch, block, loss),
      eta_w=0.7,
      eta_z=1.3,
  )


class FlowTest(float64.TestCase):
  """Laws along the integrated flow, with every factor away from 1."""

  def _check(self, attention, path, **changes):
    options = dict(attention=attention, rate_ratio=1.3 / 0.7, temperature=0.6)
    if attention == "softmax":
      options["correction"] = path.correction
    return problems.check_invariant(
        path.params.attn_logits, path.v, **options | changes
    )

  @parameterized.parameters("linear", "exp", "softmax")
  @pytest.mark.slow
  def test_holds_while_the_layer_above_trains(self, attention):
    path = _path(attention)
    check = self._check(attention, path)
    self.assertLess(check.relative_error.max(), _RTOL_FLOW)
    chex.assert_trees_all_close(
        (check.slope[1:], check.correlation[1:]),
        (jnp.ones(4), jnp.ones(4)),
        atol=_RTOL_FLOW,
    )

  @parameterized.parameters("linear", "exp")
  def test_rates_enter_by_their_ratio(self, attention):
    path = _path(attention)
    wrong = self._check(attention, path, rate_ratio=1.0)
    chex.assert_trees_all_close(
        wrong.slope[1:], jnp.full(4, 1.3 / 0.7), rtol=_RTOL_FLOW
    )

  def test_temperature_divides_exp_but_not_linear_attention(self):
    path = _path("exp")
    wrong = self._check("exp", path, temperature=1.0)
    chex.assert_trees_all_close(
        wrong.slope[1:], jnp.full(4, 1 / 0.6), rtol=_RTOL_FLOW
    )
    path = _path("linear")
    other = self._check("linear", path, temperature=1.0)
    self.assertLess(other.relative_error.max(), _RTOL_FLOW)

  @parameterized.parameters("linear", "exp")
  @pytest.mark.by_default(0)
  def test_no_single_query_obeys_the_law(self, attention):
    path = _path(attention)
    for q in range(2):
      params = path.params._replace(
          attn_logits=path.params.attn_logits[:, q : q + 1]
      )
      check = self._check(attention, path._replace(params=params))
      self.assertGreater(check.relative_error[-1], 0.1)

  @pytest.mark.slow
  def test_logits_trained_per_query_count_by_their_probability(self):
    batch, params = problems.make(3)
    block = dynamics.Block(attention="exp")
    loss = problems.stationary_loss()
    probs = jnp.bincount(batch.query, length=3) / 16
    self.assertLess(probs.min(), 0.2)
    per_query = jnp.where(probs > 0, probs, 1)[:, None]

    def slope(params, _):
      velocity = problems.velocity(params, batch, block, loss)
      return velocity._replace(attn_logits=velocity.attn_logits / per_query)

    path = flow.solve(slope, params, jnp.array([0.0, 0.5]))
    v = jnp.einsum("DM,SDK->SMK", batch.embedding, path.lower)
    weighted, plain = (
        problems.check_invariant(
            path.attn_logits, v, attention="exp", query_weights=weights
        )
        for weights in (probs, None)
    )
    self.assertLess(weighted.relative_error[-1], _RTOL_FLOW)
    self.assertGreater(plain.relative_error[-1], 0.1)


class SoftmaxTest(float64.TestCase):

  def _path(self, activation, time=0.5):
    batch, params = problems.make(1)
    block = dynamics.Block(activation=activation)
    loss = problems.stationary_loss()
    times = jnp.linspace(0.0, time, 3)
    return flow.integrate(times, params, batch, block, loss)

  @parameterized.parameters("identity", "silu")
  @pytest.mark.slow
  def test_printed_law_has_the_direction_and_misses_the_scale(self, activation):
    path = self._path(activation)
    check, first_alone = (
        problems.check_invariant(path.params.attn_logits, path.v, **options)
        for options in (
            dict(attention="softmax", attended=path.attended[0]),
            dict(attention="exp"),
        )
    )
    self.assertGreater(check.correlation[-1], 0.9)
    self.assertBetween(check.relative_error[-1], 0.02, 0.5)
    self.assertBetween(check.slope[-1], 0.7, 0.95)
    # The first term alone has the same direction, but not the sum of z.
    self.assertLess(abs(first_alone.correlation - check.correlation)[-1], 0.01)
    self.assertGreater(first_alone.relative_error[-1], check.relative_error[-1])

  @pytest.mark.slow
  def test_one_context_leaves_the_drift_of_b_bar_as_the_only_error(self):
    # With the same x in every sample E[gh b b^T] = b-bar E[gh b]^T exactly.
    batch, params = problems.make(1)
    batch = batch._replace(
        counts=jnp.broadcast_to(batch.counts[:1], batch.counts.shape)
    )
    block = dynamics.Block(activation="silu")
    path = flow.integrate(
        jnp.linspace(0.0, 1.0, 501),
        *(params, batch, block, problems.stationary_loss()),
    )
    frozen, drifting = (
        problems.check_invariant(
            *(path.params.attn_logits, path.v),
            attention="softmax",
            attended=attended,
        )
        for attended in (path.attended[0], path.attended)
    )
    # The trapezoidal rule on 500 intervals.
    self.assertLess(drifting.relative_error[-1], 1e-6)
    self.assertGreater(frozen.relative_error[-1], 1e-3)


class CheckInvariantTest(float64.TestCase):

  def test_nothing_changed_is_no_error(self):
    check = problems.check_invariant(
        jnp.ones((2, 1, 3)), jnp.ones((2, 3, 2)), attention="exp"
    )
    for values in check:
      chex.assert_trees_all_equal(values, jnp.zeros(2))

  def test_twice_the_prediction(self):
    v = jnp.array([[[0.0], [0.0]], [[2.0], [4.0]]])
    attn_logits = jnp.array([[[5.0, 5.0]], [[9.0, 21.0]]])
    check = problems.check_invariant(attn_logits, v, attention="exp")
    chex.assert_trees_all_close(
        (check.correlation[1], check.slope[1], check.relative_error[1]),
        (jnp.array(1.0), jnp.array(2.0), jnp.array(0.5)),
        atol=1e-12,
    )

  @parameterized.parameters(
      ("softmax", (), "0 given"),
      ("softmax", ("attended", "correction"), "2 given"),
      ("exp", ("attended",), "1 given"),
      ("linear", ("correction",), "1 given"),
  )
  def test_second_term_is_softmaxs_only(self, attention, names, message):
    options = {name: jnp.ones((2, 3)) for name in names}
    with self.assertRaisesRegex(ValueError, message):
      problems.check_invariant(
          *(jnp.ones((2, 1, 3)), jnp.ones((2, 3, 2))),
          attention=attention,
          **options,
      )


if __name__ == "__main__":
  absltest.main()
