"""Theorem 4 of JoMA (https://arxiv.org/abs/2310.00535): who converges first.

Near a critical point mu, with attention following the MLP by Theorem 1 (exp),

  dv/dt = (mu - v) o e^{v^2 / 2},

whereas frozen attention leaves dv/dt = mu - v. Salient components (large mu)
converge first: with delta_j = 1 - v_j / mu_j and L_j = ln(1 / delta_j),

  L_j / L_k = e^{(mu_j^2 - mu_k^2) / 2} (1 + Lambda_jk),
  Lambda_jk = lambda_jk e^{mu_k^2 / 2} / L_k,   lambda_jk bounded,

so attention, softmax(v^2 / T), gets sparse and then dense again. Without
attention all L_j grow at rate 1 and it only gets sparser. As delta underflows
within a few units of time, L is what is integrated: dL/dt = e^{v^2 / 2}.

The theorem is as quoted (the paper's text was not at hand), its first step
heuristic. Derived here: the exact time to reach L and the limit of lambda_jk,
which the paper bounds (`time_to_reach`, `lambda_limit`).

Letters as in `joma.theory`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from joma.theory import flow
from joma.theory import metrics
from scansnap_jax.dynamics import Scalar


def log_inverse_gap(
    v: Float[Array, "*b J"], mu: Float[Array, "J"]
) -> Float[Array, "*b J"]:
  """Computes L = -ln(1 - v / mu), for v / mu < 1."""
  # log1p, and -expm1 on the way back, as delta near 1 has digits in v alone.
  return -jnp.log1p(-v / jnp.broadcast_to(mu, v.shape))


def components(
    log_inverse_gap: Float[Array, "*b J"], mu: Float[Array, "J"]
) -> Float[Array, "*b J"]:
  """Computes v = mu (1 - e^{-L})."""
  reached = -jnp.expm1(-log_inverse_gap)
  return jnp.broadcast_to(mu, reached.shape) * reached


@functools.partial(jax.jit, static_argnames="has_attention")
def integrate(
    times: Float[Array, "S"],
    mu: Float[Array, "J"],
    initial: Float[Array, "J"],
    *,
    has_attention: bool = True,
) -> Float[Array, "S J"]:
  """Integrates dL/dt = e^{v^2 / 2}; without attention dL/dt = 1.

  Args:
    times: Increasing; the initial state holds at times[0].
    mu: Where v tends to, no entry zero.
    initial: v at the start, with v / mu < 1.
    has_attention: Whether attention follows the MLP or is frozen.

  Returns:
    L, from which `components` gives v.
  """

  def slope(gap: Float[Array, "J"], _: Float[Array, ""]) -> Float[Array, "J"]:
    # d(ln 1/delta)/dt = (dv/dt) / (mu - v): the factor that goes to 0 cancels,
    # and with it the underflow of delta.
    v = components(gap, mu)
    return jnp.exp(v**2 / 2) if has_attention else jnp.ones_like(gap)

  return flow.solve(slope, log_inverse_gap(initial, mu), times)


def ratio_limit(mu_j: Scalar, mu_k: Scalar) -> Float[Array, ""]:
  """Computes the limit of L_j / L_k, e^{(mu_j^2 - mu_k^2) / 2} (Theorem 4)."""
  return jnp.exp(jnp.asarray(mu_j**2 - mu_k**2) / 2)


def measured_lambda(
    gap_j: Float[Array, "*S"],
    gap_k: Float[Array, "*S"],
    mu_j: float,
    mu_k: float,
) -> Float[Array, "*S"]:
  """Computes lambda_jk from L_j and L_k (Theorem 4 solved for it)."""
  ratio = gap_j / gap_k / ratio_limit(mu_j, mu_k)
  return (ratio - 1) * gap_k * jnp.exp(jnp.asarray(-(mu_k**2) / 2))


def lambda_limit(
    mu_j: float, mu_k: float, initial_j: float, initial_k: float
) -> Float[Array, ""]:
  """Computes what lambda_jk tends to (derived here).

  t = e^{-mu^2/2} L + chi(mu, L) is exact with chi -> chi(mu), a constant, as
  L grows. Equal times of j and k give lambda_jk -> chi(mu_k) - chi(mu_j).

  Args:
    mu_j: Limit of component j.
    mu_k: Limit of component k.
    initial_j: v_j(0).
    initial_k: v_k(0).

  Returns:
    The limit.
  """
  chi = lambda mu, v: _delay(mu, 1 - jnp.asarray(v / mu), 0.0)
  return chi(mu_k, initial_k) - chi(mu_j, initial_j)


def time_to_reach(
    log_inverse_gap: Float[Array, "*S"], mu: float, initial: float
) -> Float[Array, "*S"]:
  """Computes when a component reaches L (derived here).

  t = int e^{-v^2/2} dL = e^{-mu^2/2} (L - L(0) + int_delta^delta(0)
  (e^{mu^2 (s - s^2/2)} - 1) / s ds), since mu^2 - v^2 = mu^2 (2 s - s^2).

  Args:
    log_inverse_gap: L, at least its initial value.
    mu: Where the component tends to, at most about 8 in size.
    initial: Its value at time 0.

  Returns:
    Times, by quadrature.
  """
  delay = _delay(mu, 1 - initial / mu, jnp.exp(-log_inverse_gap))
  return jnp.exp(jnp.asarray(-(mu**2) / 2)) * log_inverse_gap + delay


def _delay(
    mu: float, first: Scalar, last: float | Float[Array, "*S"]
) -> Float[Array, "*S"]:
  """Computes chi: the time at L, less e^{-mu^2/2} L."""
  # The integrand (e^{mu^2 (s - s^2/2)} - 1) / s is entire in s: Gauss-Legendre
  # converges geometrically, with 100 nodes for mu up to 8.
  nodes, weights = np.polynomial.legendre.leggauss(100)
  half = (first - jnp.asarray(last)) / 2
  s = jnp.multiply.outer(half, 1 + nodes) + jnp.asarray(last)[..., None]
  # expm1 keeps the quotient at small s, where it tends to mu^2.
  excess = jnp.expm1(mu**2 * (s - s**2 / 2)) / s @ weights
  return jnp.exp(jnp.asarray(-(mu**2) / 2)) * (jnp.log(first) + half * excess)


def attention_entropy(
    v: Float[Array, "*S J"], temperature: Scalar = 1.0
) -> Float[Array, "*S"]:
  """Computes the entropy of softmax(v^2 / T), in nats.

  Args:
    v: Components.
    temperature: T. The paper's exp attention would have T = 2 by Theorem 1.

  Returns:
    From 0 to ln J.
  """
  return metrics.attention_entropy(v**2 / temperature)


class ReducedPath(NamedTuple):
  """Steps of Figure 4's map.

  Attributes:
    v: Before each step, and after the last [S, J].
    entropy: Of the attention at these v [S].
  """

  v: Float[Array, "S J"]
  entropy: Float[Array, "S"]


def figure4_path(
    mu: Float[Array, "J"],
    *,
    initial: float = 0.05,
    temperature: float = 3.0,
    step_size: float = 0.02,
    num_steps: int = 5000,
) -> ReducedPath:
  """Iterates v <- v + eta (mu - v) o softmax(v^2 / T), Figure 4.

  Differs from the theorem as the paper's code does: attention is normalized,
  and T = 3 instead of 2. Its entropy, -sum_l p_l (ln p_l + 1e-8), has the
  code's offset too.

  Args:
    mu: Where v tends to.
    initial: First value of every component.
    temperature: T.
    step_size: eta.
    num_steps: How many steps.

  Returns:
    num_steps + 1 states.
  """

  def step(
      v: Float[Array, "J"], _: None
  ) -> tuple[Float[Array, "J"], Float[Array, "J"]]:
    # Normalized attention, and the state before the step is recorded, both as
    # in the authors' code.
    weights = jax.nn.softmax(v**2 / temperature)
    return v + step_size * (mu - v) * weights, v

  last, path = jax.lax.scan(step, jnp.full_like(mu, initial), length=num_steps)
  v = jnp.concatenate([path, last[None]])
  return ReducedPath(v, attention_entropy(v, temperature) - 1e-8)
