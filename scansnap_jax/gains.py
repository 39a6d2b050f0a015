"""What a distinct token gains over another: Theorems 3 and 4.

The relative gain r = f_l^2 / f_l'^2 - 1 of two distinct tokens of a class keeps
its start r(0) as a factor; what grows is chi, and B_n bounds it: like 1/2 ln t
while scanning, like 1/2 ln ln t while snapping
(https://arxiv.org/abs/2305.16380). Symbols as in `dynamics`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from scansnap_jax import growth
from scansnap_jax.dynamics import Scalar
from scansnap_jax.growth import Times


def relative_gain(
    attn_weights: Float[Array, "*b M"],
    token: int | Int[Array, ""],
    other: int | Int[Array, ""],
) -> Float[Array, "*b"]:
  """Computes r_{l/l'|n} = f_nl^2 / f_nl'^2 - 1 (Theorem 3).

  Args:
    attn_weights: f_n, or anything proportional to it, such as c_n.
    token: l.
    other: l', which must get some attention.

  Returns:
    The relative gain, -1 or more.
  """
  # The norm of f_n cancels in the ratio, so that c_n serves as well.
  return (attn_weights[..., token] / attn_weights[..., other]) ** 2 - 1


def gain_growth(
    attn_logit: Scalar | Float[Array, "*S"], initial: Scalar
) -> Float[Array, "*S"]:
  """Computes chi_l = e^{2 (z_ml(t) - z_ml(0))}, with r = r(0) chi (Theorem 3).

  Exact under Lemma 4 for two distinct tokens of a class; approximate under
  stochastic gradients, where the past of f_n enters.

  Args:
    attn_logit: z_ml(t).
    initial: z_ml(0).

  Returns:
    chi, positive, and 1 at the start.
  """
  return jnp.exp(2 * (jnp.asarray(attn_logit) - initial))


def gain_growth_bounds(
    feature: Scalar, exponent: Times
) -> tuple[Float[Array, "*S"], Float[Array, "*S"]]:
  """Bounds e^{2 f(0)^2 B} <= chi_l0 <= e^{2 B} (Theorem 3).

  Args:
    feature: f_nl0(0) of the distinct token l0 that leads its class.
    exponent: B_n(t), the integral of eta_z xi_n.

  Returns:
    (lower, upper). They hold while all common tokens of n lose attention.
  """
  exponent = jnp.asarray(exponent)
  return jnp.exp(2 * feature**2 * exponent), jnp.exp(2 * exponent)


def _exponent(
    h: Float[Array, "*S"], run: growth.TheoryRun
) -> Float[Array, "*S"]:
  """Computes 1/4 ln[1 + 2 (eta_z / eta_y) K (M - 1)^2 h^2 / C0]."""
  # log1p, as the sum is 1 to rounding at the start, where B_n itself is small.
  factor = 2 * run.num_classes * run.eta_z / run.eta_y
  return jnp.log1p(factor / run.c0 * ((run.num_tokens - 1) * h) ** 2) / 4


def gain_exponent(t: Times, run: growth.TheoryRun) -> Float[Array, "*S"]:
  """Computes B_n(t) for one common token and one query (Theorem 4).

  B = 1/4 ln[(C0 + 2 (eta_z/eta_y) K (M-1)^2 h^2(t/K)) / C0], which grows as
  1/2 ln t before t0' and as 1/2 ln ln t after t0.

  Differs from the paper, which leaves out the division by C0: its B_n(0) is
  1/4 ln C0 instead of 0 (`gain_exponent_as_printed`).

  Args:
    t: Samples seen, at least 0.
    run: All of it matters; c0 is positive.

  Returns:
    B_n, which rises from 0.
  """
  h = growth.h_continuous(
      t / run.num_classes, num_tokens=run.num_tokens, eta_y=run.eta_y
  )
  return _exponent(h, run)


def gain_exponent_as_printed(
    t: Times, run: growth.TheoryRun
) -> Float[Array, "*S"]:
  """Computes the paper's form of Theorem 4, which is B_n + 1/4 ln C0.

  Args:
    t: Samples seen, at least 0.
    run: All of it matters; c0 is positive.

  Returns:
    The printed B_n, which starts at 1/4 ln C0.
  """
  return gain_exponent(t, run) + jnp.log(run.c0) / 4


def scanning_exponent(t: Times, run: growth.TheoryRun) -> Float[Array, "*S"]:
  """Computes B_n's leading order before t0' (Theorem 4), an upper bound.

  h ~ eta_y t / (M K), hence B ~ 1/2 ln t and chi at most linear in t.

  Args:
    t: Samples seen, at least 0.
    run: All of it matters; c0 is positive.

  Returns:
    A bound on B_n for all t, near it up to t0'.
  """
  s = jnp.asarray(run.eta_y * t / run.num_classes)
  return _exponent(s / run.num_tokens, run)


def snapping_exponent(t: Times, run: growth.TheoryRun) -> Float[Array, "*S"]:
  """Computes B_n's leading order after t0 (Theorem 4), an upper bound.

  h ~ ln(M eta_y t / K) / M, hence B ~ 1/2 ln ln t and chi = O(ln t). The
  logarithm is taken of 1 + M eta_y t / K, which makes it a bound for all t.

  Args:
    t: Samples seen, at least 0.
    run: All of it matters; c0 is positive.

  Returns:
    A bound on B_n for all t, near it from t0 on.
  """
  s = jnp.asarray(run.eta_y * t / run.num_classes)
  return _exponent(jnp.log1p(run.num_tokens * s) / run.num_tokens, run)
