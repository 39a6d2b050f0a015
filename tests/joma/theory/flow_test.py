from absl.testing import absltest
import chex
import jax
import jax.numpy as jnp
import pytest

from joma.theory import dynamics
from joma.theory import flow
from tests.joma import problems
from tests.scansnap_jax.theorems import float64

_ATOL = 1e-12
# Along an integrated path: ten times the largest error seen.
_ATOL_FLOW = 1e-9


class DescendTest(float64.TestCase):

  @pytest.mark.slow
  def test_one_step_follows_the_velocity_at_each_rate(self):
    batch, params = problems.make(3)
    loss, upper = problems.upper_loss()
    params = params._replace(upper=upper)
    block = dynamics.Block(activation="silu")
    path = flow.descend(
        *(params, batch, block, loss), eta_w=0.3, eta_z=0.05, num_records=1
    )
    v = problems.velocity(params, batch, block, loss)
    expected = dynamics.Params(
        params.lower + 0.3 * v.lower,
        params.attn_logits + 0.05 * v.attn_logits,
        params.upper + 0.3 * v.upper,
    )
    chex.assert_trees_all_close(
        jax.tree.map(lambda x: x[1], path.params), expected, atol=_ATOL
    )
    _, shared = problems.reduced_velocity(
        problems.reduce(params, batch), batch, block, loss
    )
    chex.assert_trees_all_close(
        path.correction[1], 0.05 * shared.sum(axis=0), atol=_ATOL
    )

  @pytest.mark.slow
  def test_records_are_every_so_many_steps(self):
    batch, params = problems.make(1)
    arguments = (params, batch, dynamics.Block(), problems.stationary_loss())
    rates = dict(eta_w=0.1, eta_z=0.1)
    fine = flow.descend(*arguments, **rates, num_records=6)
    coarse = flow.descend(
        *arguments, **rates, num_records=2, steps_per_record=3
    )
    chex.assert_trees_all_close(
        coarse, jax.tree.map(lambda x: x[::3], fine), atol=_ATOL
    )

  @pytest.mark.slow
  def test_observations_are_of_the_recorded_state(self):
    batch, params = problems.make(3)
    block = dynamics.Block(attention="exp", temperature=0.7)
    path = flow.descend(
        *(params, batch, block, problems.stationary_loss()),
        eta_w=0.1,
        eta_z=0.1,
        num_records=4,
    )
    chex.assert_trees_all_close(
        path.v[4], batch.embedding.T @ path.params.lower[4], atol=_ATOL
    )
    scores = jnp.exp(path.params.attn_logits[4] / 0.7)[batch.query]
    chex.assert_trees_all_close(
        path.attended[4], (scores * batch.counts).mean(axis=0), atol=_ATOL
    )


class IntegrateTest(float64.TestCase):

  @pytest.mark.slow
  def test_reduced_flow_is_the_same_without_the_width(self):
    batch, params = problems.make(3)
    block = dynamics.Block(activation="gelu", temperature=0.7)
    loss = problems.stationary_loss()
    times = jnp.linspace(0.0, 1.0, 3)
    path = flow.integrate(times, params, batch, block, loss)
    slope = lambda x, _: problems.reduced_velocity(x, batch, block, loss)[0]
    reduced = flow.solve(slope, problems.reduce(params, batch), times)
    chex.assert_trees_all_close(
        (path.v, path.params.attn_logits),
        (reduced.v, reduced.attn_logits),
        atol=_ATOL_FLOW,
    )

  @pytest.mark.slow
  def test_descent_tends_to_the_flow_linearly_in_the_step(self):
    batch, params = problems.make(1)
    arguments = (params, batch, dynamics.Block(), problems.stationary_loss())
    flown = flow.integrate(
        jnp.array([0.0, 0.5]), *arguments, eta_w=1.0, eta_z=2.0
    )
    gaps = []
    for steps in (50, 100):
      path = flow.descend(
          *arguments,
          eta_w=0.5 / steps,
          eta_z=1 / steps,
          num_records=1,
          steps_per_record=steps,
      )
      gaps.append(jnp.abs(path.v[1] - flown.v[1]).max())
      gaps.append(jnp.abs(path.correction[1] - flown.correction[1]).max())
    self.assertBetween(gaps[0] / gaps[2], 1.9, 2.1)
    self.assertBetween(gaps[1] / gaps[3], 1.9, 2.1)


if __name__ == "__main__":
  absltest.main()
