"""Theorem 2 of JoMA (https://arxiv.org/abs/2310.00535): linear activation.

One hidden node (F = 1), one query, phi = identity and stationary g: whatever
token has the largest |Delta_l| takes all, where

  Delta_l = E[g x_l] = E[g | l] P(l)

is how much a token tells, times how often it occurs. With exp attention and
zero initial values Theorem 1 turns the flow into

  dv/dt = Delta o e^{s^2 v^2 / 2},   hence   erf(s v_l / sqrt 2) / Delta_l
                                             = sqrt(2 / pi) s t for every l.

Differs from the paper as it is remembered (its text was not at hand), which has
erf(v / 2): int e^{-v^2/2} dv = sqrt(pi / 2) erf(v / sqrt 2), so it is sqrt 2.
Derived here: the sharpness s = sqrt(eta_z / eta_w) / T, with t in units of
1 / eta_w; the paper has s = 1.

Letters as in `joma.theory`.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from joma.theory import flow
from scansnap_jax.dynamics import Scalar


def velocity(
    v: Float[Array, "M"], delta: Float[Array, "M"], sharpness: Scalar = 1.0
) -> Float[Array, "M"]:
  """Computes dv/dt = Delta o e^{s^2 v^2 / 2}, exp attention."""
  return delta * jnp.exp((sharpness * v) ** 2 / 2)


def erf_ratio(
    v: Float[Array, "*S M"], delta: Float[Array, "M"], sharpness: Scalar = 1.0
) -> Float[Array, "*S M"]:
  """Computes erf(s v_l / sqrt 2) / Delta_l, equal for all l (Theorem 2).

  Args:
    v: Components that started at 0.
    delta: Delta, no entry zero.
    sharpness: s.

  Returns:
    sqrt(2 / pi) s t for every token.
  """
  scaled = sharpness * v / math.sqrt(2)
  return jax.scipy.special.erf(scaled) / jnp.broadcast_to(delta, v.shape)


def components(
    t: Scalar, delta: Float[Array, "M"], sharpness: Scalar = 1.0
) -> Float[Array, "M"]:
  """Computes v(t) = sqrt 2 / s erfinv(sqrt(2 / pi) s Delta t), from v = 0.

  Args:
    t: From 0 to `blow_up_time`.
    delta: Delta.
    sharpness: s.

  Returns:
    v, infinite for the winner at the end.
  """
  reached = math.sqrt(2 / math.pi) * sharpness * t * delta
  return math.sqrt(2) / sharpness * jax.scipy.special.erfinv(reached)


def blow_up_time(
    delta: Float[Array, "M"], sharpness: Scalar = 1.0
) -> Float[Array, ""]:
  """Computes t* = sqrt(pi / 2) / (s max_l |Delta_l|), when v is infinite."""
  return math.sqrt(math.pi / 2) / (sharpness * jnp.abs(delta).max())


def frozen_components(
    delta: Float[Array, "M"], sharpness: Scalar = 1.0
) -> Float[Array, "M"]:
  """Computes v(t*) = sqrt 2 / s erfinv(Delta_l / max |Delta|).

  Args:
    delta: Delta.
    sharpness: s.

  Returns:
    Infinite for the winner, finite for all others: attention on them vanishes.
  """
  # erf(s v / sqrt 2) / Delta is the same for all, and erf is 1 for the winner.
  share = delta / jnp.abs(delta).max()
  return math.sqrt(2) / sharpness * jax.scipy.special.erfinv(share)


def integrate(
    clock: Float[Array, "S"], delta: Float[Array, "M"]
) -> tuple[Float[Array, "S"], Float[Array, "S M"]]:
  """Integrates the flow at s = 1 from v = 0 with the winner as the clock.

  dt/du = e^{-u^2/2} / |Delta_w| and dv/du = Delta / |Delta_w| e^{(v^2-u^2)/2},
  u = |v_w|: no blow-up, and errors in time stay of the size of the time left.

  Args:
    clock: u, increasing from 0.
    delta: Delta; w is its largest entry in absolute value.

  Returns:
    Times t and components v when |v_w| = u.
  """
  # The winner's own value is the clock: dv/dt of all tokens over d|v_w|/dt
  # stays bounded where v_w(t) blows up.
  fastest = jnp.abs(delta).max()

  def slope(
      state: tuple[Float[Array, ""], Float[Array, "M"]], u: Float[Array, ""]
  ) -> tuple[Float[Array, ""], Float[Array, "M"]]:
    v = state[1]
    return (
        jnp.exp(-(u**2) / 2) / fastest,
        delta / fastest * jnp.exp((v**2 - u**2) / 2),
    )

  return flow.solve(slope, (jnp.zeros_like(fastest), 0 * delta), clock)


def linear_components(
    t: Scalar,
    delta: Float[Array, "M"],
    v: Float[Array, "M"],
    attn_logits: Float[Array, "M"],
) -> tuple[Float[Array, "M"], Float[Array, "M"]]:
  """Computes v(t) and z(t) under linear attention (derived here).

  dv/dt = Delta o z and dz/dt = Delta o v give cosh and sinh of Delta t. While
  z > 0 this is dv/dt = Delta o sqrt(v^2 + c) with c = z^2 - v^2 of Theorem 1;
  the closed form needs no sign of z or c. Zero initial values are a fixed
  point.

  Args:
    t: Time.
    delta: Delta.
    v: Initial v.
    attn_logits: Initial z; T = 1 and equal rates.

  Returns:
    (v(t), z(t)).
  """
  # The system is linear, with eigenvalues + and - Delta.
  cosh, sinh = jnp.cosh(delta * t), jnp.sinh(delta * t)
  return v * cosh + attn_logits * sinh, attn_logits * cosh + v * sinh


def softmax_direction(
    v: Float[Array, "M"],
    delta: Float[Array, "M"],
    attended: Float[Array, "M"],
) -> Float[Array, "M"]:
  """Computes Delta o exp((v^2 - |v|^2 b-bar) / 2), softmax attention.

  dv/dt is along it as far as Theorem 1's approximation holds and the normalizer
  A varies little between samples.

  Args:
    v: Components.
    delta: Delta.
    attended: b-bar.

  Returns:
    The direction of dv/dt, of no particular length.
  """
  return delta * jnp.exp((v**2 - (v @ v) * attended) / 2)
