"""Gradient flow of Scan & Snap (https://arxiv.org/abs/2305.16380), integrated.

Two systems of differential equations: both matrices under the expected
cross-entropy of infinitely long sequences (`integrate`), and attention alone
under the velocity of Lemma 4 (`integrate_attention`).

Symbols as in `dynamics`, letters as in `scansnap_jax`.
"""

from collections.abc import Callable

import jax
from jax.experimental import ode
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from scansnap_jax import dynamics

# Y and Z, or their velocities.
_Matrices = tuple[Float[Array, "M M"], Float[Array, "M M"]]


def expected_loss(
    decoder: Float[Array, "M M"],
    attn_logits: Float[Array, "M M"],
    probs: Float[Array, "K M"],
    query: Int[Array, "K"],
    label: Int[Array, "K"],
    class_weights: Float[Array, "K"],
) -> Float[Array, ""]:
  """Computes the expected cross-entropy for T -> infinity, in nats.

  -sum_n weight_n ln softmax(Y^T f_n)[n], where f_n follows from P(l|n).

  Args:
    decoder: Y.
    attn_logits: Z.
    probs: P(l|n), one row per class, zero where a token never occurs.
    query: psi(n), the query token of each class.
    label: The token that each class predicts.
    class_weights: Probability of each class; they sum to 1.

  Returns:
    The mean over samples, at least 0; ln M at Y = 0.
  """
  features = dynamics.class_features(probs, attn_logits, query)
  # Row n of F Y are the logits of class n, Y^T f_n.
  log_probs = jax.nn.log_softmax(features @ decoder, axis=-1)
  correct = jnp.take_along_axis(log_probs, label[:, None], axis=-1)[:, 0]
  return -class_weights @ correct


def integrate(
    times: Float[Array, "S"],
    decoder: Float[Array, "M M"],
    attn_logits: Float[Array, "M M"],
    probs: Float[Array, "K M"],
    query: Int[Array, "K"],
    label: Int[Array, "K"],
    *,
    eta_y: dynamics.Scalar,
    eta_z: dynamics.Scalar,
    momentum: float = 0.0,
    class_weights: Float[Array, "K"] | None = None,
) -> tuple[Float[Array, "S M M"], Float[Array, "S M M"]]:
  """Integrates dY/dt = -eta_y dL/dY and dZ/dt = -eta_z dL/dZ.

  With momentum mu, the heavy ball's flow: dY/dt = -eta_y V with
  dV/dt = dL/dY - (1 - mu) V from V = 0, and likewise for Z.

  One unit of time is one step: L is the mean over samples, as over a batch of
  any size. With batches of one, time counts samples, as in `dynamics`.

  Args:
    times: Increasing, in steps; the initial state holds at times[0].
    decoder: Initial Y.
    attn_logits: Initial Z.
    probs: As `expected_loss`.
    query: As `expected_loss`.
    label: As `expected_loss`.
    eta_y: Learning rate of Y.
    eta_z: Learning rate of Z.
    momentum: Coefficient mu in [0, 1) of SGD with momentum.
    class_weights: Probability of each class; None makes them equal.

  Returns:
    Y and Z at each time, in the float type of the initial state.
  """
  if class_weights is None:
    class_weights = jnp.full(len(probs), 1 / len(probs), probs.dtype)
  slope = jax.grad(expected_loss, argnums=(0, 1))
  rates = (eta_y, eta_z)
  slopes_at = lambda state: slope(*state, probs, query, label, class_weights)
  start = (decoder, attn_logits)
  if not momentum:
    descend = lambda state, _: jax.tree.map(
        lambda rate, d: -rate * d, rates, slopes_at(state)
    )
    return _odeint(descend, start, times)

  roll = lambda state, _: _heavy_ball(state, slopes_at, rates, momentum)
  at_rest = jax.tree.map(jnp.zeros_like, start)
  return _odeint(roll, (start, at_rest), times)[0]


def _heavy_ball(
    state: tuple[_Matrices, _Matrices],
    slopes_at: Callable[[_Matrices], _Matrices],
    rates: tuple[dynamics.Scalar, dynamics.Scalar],
    momentum: float,
) -> tuple[_Matrices, _Matrices]:
  """Velocities of the matrices and of their speeds V."""
  matrices, speeds = state
  slopes = slopes_at(matrices)
  # Rates stand at the matrices, not in V, as optax has them.
  return (
      jax.tree.map(lambda rate, v: -rate * v, rates, speeds),
      jax.tree.map(lambda d, v: d - (1 - momentum) * v, slopes, speeds),
  )


def integrate_attention(
    times: Float[Array, "S"],
    attn_logits: Float[Array, "M M"],
    probs: Float[Array, "K M"],
    query: Int[Array, "K"],
    *,
    gamma: Callable[[Float[Array, ""]], Float[Array, ""]],
    eta_z: dynamics.Scalar,
) -> tuple[Float[Array, "S M M"], Float[Array, "S K"]]:
  """Integrates Lemma 4 and the exponent of Theorem 3.

  Args:
    times: Increasing, in the unit of `gamma`; the initial state holds at
      times[0].
    attn_logits: Initial Z.
    probs: P(l|n).
    query: psi(n).
    gamma: Speed control as a function of time.
    eta_z: Learning rate of Z.

  Returns:
    Z and B_n = eta_z int xi_n dt (from times[0]) at each time.
  """

  def velocity(
      state: tuple[Float[Array, "M M"], Float[Array, "K"]], t: Float[Array, ""]
  ) -> tuple[Float[Array, "M M"], Float[Array, "K"]]:
    features = dynamics.class_features(probs, state[0], query)
    dz = dynamics.attention_velocity(features, query, gamma(t), eta_z)
    return dz, eta_z * dynamics.xi(features, gamma(t))

  # B_n is integrated beside Z, as a further state: its error is controlled with
  # the same tolerance, and needs no quadrature of its own.
  exponent = jnp.zeros(len(probs), attn_logits.dtype)
  return _odeint(velocity, (attn_logits, exponent), times)


def _odeint(
    velocity: Callable[..., PyTree], state: PyTree, times: Float[Array, "S"]
) -> PyTree:
  """Integrates d state / dt = velocity(state, t); leaves [S, ...]."""
  # 2e-12 in float64 and 6e-6 in float32: as far as rounding lets steps go.
  tolerance = float(jnp.finfo(times.dtype).eps) ** 0.75
  return ode.odeint(velocity, state, times, rtol=tolerance, atol=tolerance)
