"""Trajectories of JoMA's block (https://arxiv.org/abs/2310.00535).

Gradient descent with a finite step (`descend`) and its limit, the gradient flow
(`integrate`). Both give what Theorem 1 is checked on. Symbols as in
`dynamics`, letters as in `joma.theory`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.experimental import ode
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from joma.theory import dynamics
from scansnap_jax.dynamics import Scalar

# The parameters, and the correction so far.
_State = tuple[dynamics.Params, Float[Array, "*S M"]]


class Trajectory(NamedTuple):
  """A run at its recorded times, the start included.

  Attributes:
    params: `dynamics.Params` with a leading axis of times [S, ...].
    v: U_C^T W [S, M, F].
    attended: b-bar = E[b] [S, M], over all samples.
    correction: [S, M], the integral of eta_z E[b b^T sum_k gh_k v_k] / T so
      far, which the exact law of softmax attention subtracts; 0 for the others.
  """

  params: dynamics.Params
  v: Float[Array, "S M F"]
  attended: Float[Array, "S M"]
  correction: Float[Array, "S M"]


def descend(
    params: dynamics.Params,
    batch: dynamics.Batch,
    block: dynamics.Block,
    loss: dynamics.Loss,
    *,
    eta_w: Scalar,
    eta_z: Scalar,
    num_records: int,
    steps_per_record: int | Int[Array, ""] = 1,
) -> Trajectory:
  """Trains by full-batch gradient descent.

  Args:
    params: Initial state.
    batch: All samples.
    block: The kind of block.
    loss: Of the hidden nodes and the upper weights, a mean over samples.
    eta_w: Learning rate of W and of the upper weights.
    eta_z: Learning rate of z.
    num_records: How many times to record after the start.
    steps_per_record: Steps from one record to the next.

  Returns:
    The run at steps 0, steps_per_record, 2 steps_per_record, ...
  """

  def step(_: Int[Array, ""], state: _State) -> _State:
    params, correction = state
    slope, shared = _velocity(params, batch, block, loss, eta_w, eta_z)
    return jax.tree.map(jnp.add, params, slope), correction + shared

  def record(state: _State, _: None) -> tuple[_State, _State]:
    return jax.lax.fori_loop(0, steps_per_record, step, state), state

  # The correction advances in the same step as the parameters, from the same b
  # and gh: the exact law then errs by the step alone.
  start = (params, jnp.zeros_like(params.attn_logits[0]))
  end, states = jax.lax.scan(record, start, length=num_records)
  append = lambda past, last: jnp.concatenate([past, last[None]])
  path = jax.tree.map(append, states, end)
  return _observe(path, batch, block)


def integrate(
    times: Float[Array, "S"],
    params: dynamics.Params,
    batch: dynamics.Batch,
    block: dynamics.Block,
    loss: dynamics.Loss,
    *,
    eta_w: Scalar = 1.0,
    eta_z: Scalar = 1.0,
) -> Trajectory:
  """Integrates dW/dt = -eta_w dL/dW and dz/dt = -eta_z dL/dz.

  Exp attention can blow up in finite time: keep `times` short of it.

  Args:
    times: Increasing; the initial state holds at times[0].
    params: Initial state.
    batch: All samples.
    block: The kind of block.
    loss: Of the hidden nodes and the upper weights, a mean over samples.
    eta_w: Learning rate of W and of the upper weights.
    eta_z: Learning rate of z.

  Returns:
    The run at these times.
  """

  def slope(state: _State, _: Float[Array, ""]) -> _State:
    return _velocity(state[0], batch, block, loss, eta_w, eta_z)

  start = (params, jnp.zeros_like(params.attn_logits[0]))
  return _observe(solve(slope, start, times), batch, block)


def solve(
    slope: Callable[[PyTree, Float[Array, ""]], PyTree],
    state: PyTree,
    times: Float[Array, "S"],
) -> PyTree:
  """Integrates d state / dt = slope(state, t) as far as rounding lets steps go.

  Args:
    slope: Velocity, of the structure of `state`.
    state: Initial state, any tree.
    times: Increasing; the initial state holds at times[0].

  Returns:
    The states at these times: relative error about 2e-12 in float64.
  """
  # Smaller ones make the step size control chase rounding.
  tolerance = float(jnp.finfo(times.dtype).eps) ** 0.75
  return ode.odeint(slope, state, times, rtol=tolerance, atol=tolerance)


def _velocity(
    params: dynamics.Params,
    batch: dynamics.Batch,
    block: dynamics.Block,
    loss: dynamics.Loss,
    eta_w: Scalar,
    eta_z: Scalar,
) -> _State:
  """Velocities of the parameters and of the correction, with their rates."""
  slope = dynamics.velocity(params, batch, block, loss)
  state = dynamics.reduce(params, batch)
  _, shared = dynamics.reduced_velocity(state, batch, block, loss)
  scaled = dynamics.Params(
      eta_w * slope.lower,
      eta_z * slope.attn_logits,
      jax.tree.map(lambda x: eta_w * x, slope.upper),
  )
  return scaled, eta_z * shared.sum(axis=0)


def _observe(
    path: _State, batch: dynamics.Batch, block: dynamics.Block
) -> Trajectory:
  """Reads v and b-bar off recorded states, leaves [S, ...]."""
  params, correction = path
  attended = lambda z: dynamics.attended_tokens(z, batch, block).mean(axis=0)
  b = jax.vmap(attended)(params.attn_logits)
  # Read off afterwards, as only the recorded steps need it.
  v = jnp.einsum("DM,SDF->SMF", batch.embedding, params.lower)
  return Trajectory(params, v, b, correction)
