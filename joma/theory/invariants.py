"""Theorem 1 of JoMA (https://arxiv.org/abs/2310.00535): joint invariants.

The logits follow the lower MLP layer, seen through the embeddings, v = U_C^T W.
With c constant in time, squares taken element by element,

  linear    z^2 = sum_k v_k^2 + c
  exp       z   = 1/2 sum_k v_k^2 + c
  softmax   z   = 1/2 sum_k (v_k^2 - |v_k|^2 b-bar) + c,  b-bar = E[b]

in the form in which the paper is quoted (its text was not at hand). Derived
here, from dv_k/dt = E[gh_k b] and z's flow (`dynamics.reduced_velocity`):

  - The first two are identities of gradient flow, for any g_k(t) and any
    activation, also while the layers above train.
  - Rates eta_w, eta_z multiply the right side by eta_z / eta_w. Temperature T
    multiplies it by 1 / T for exp and softmax attention; the law of linear
    attention does not depend on it.
  - Several queries with one W obey them in the sum over queries only, in which
    each velocity counts with P(q = m). Gradients of the mean loss carry that
    factor already; `query_weights` is for logits trained per query.
  - The third is an approximation: it takes b-bar as constant and
    E[gh_k b b^T] as b-bar E[gh_k b]^T. Exact is
      dz/dt = sum_k v_k o dv_k/dt - E[b b^T sum_k gh_k v_k],
    whose second term `flow.Trajectory.correction` integrates.
  - Softmax attention conserves sum_l z_l.

Finite steps, momentum, weight decay and Adam break them; a finite step does so
to first order in it. Letters as in `joma.theory`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from joma.theory import dynamics
from joma.theory import metrics
from scansnap_jax.dynamics import Scalar


class InvariantCheck(NamedTuple):
  """How well Theorem 1 predicts the change since the first time.

  All are 0 at the first time and as long as nothing has changed.

  Attributes:
    correlation: Normalized correlation [S], blind to scale.
    slope: Least-squares slope of the measured change on the predicted one [S];
      1 if the law holds, below 1 if it predicts too much.
    relative_error: |predicted - measured| / |measured| [S].
  """

  correlation: Float[Array, "S"]
  slope: Float[Array, "S"]
  relative_error: Float[Array, "S"]


def measured_change(
    attn_logits: Float[Array, "S Q M"],
    *,
    attention: dynamics.Attention,
    query_weights: Float[Array, "Q"] | None = None,
) -> Float[Array, "S M"]:
  """Computes the left side: the change of sum_m z_m, or of sum_m z_m^2.

  Args:
    attn_logits: z over time.
    attention: Kind of attention; squares for linear.
    query_weights: P(q = m) if each query's logits have moved with
      E[. | q = m]; None if with the gradient of the mean loss.

  Returns:
    The change since the first time.
  """
  # Linear attention conserves squares: dz/dt = v dv/dt / z there.
  terms = attn_logits**2 if attention == "linear" else attn_logits
  if query_weights is None:
    query_weights = jnp.ones(terms.shape[1], terms.dtype)
  left = jnp.einsum("SQM,Q->SM", terms, query_weights)
  return left - left[:1]


def predicted_change(
    v: Float[Array, "S M F"],
    *,
    attention: dynamics.Attention,
    rate_ratio: Scalar = 1.0,
    temperature: Scalar = 1.0,
    attended: Float[Array, "*S M"] | None = None,
    correction: Float[Array, "S M"] | None = None,
) -> Float[Array, "S M"]:
  """Computes the right side from the lower MLP layer.

  Args:
    v: U_C^T W over time.
    attention: Kind of attention. The first term of softmax attention's law
      alone is the law of exp attention.
    rate_ratio: eta_z / eta_w.
    temperature: T.
    attended: For softmax: b-bar, either one [M], the printed law, or over time
      [S, M], which integrates b-bar d|v_k|^2 by the trapezoidal rule.
    correction: For softmax, instead of b-bar: the exact second term, integrated
      with rate and temperature included (`flow.Trajectory.correction`).

  Returns:
    The change since the first time.

  Raises:
    ValueError: If softmax attention has not exactly one of the two, or another
      kind has any.
  """
  given = (attended is not None) + (correction is not None)
  if given != (attention == "softmax"):
    raise ValueError(
        "Softmax attention needs either attended or correction, other kinds"
        f" neither: {attention=}, {given} given."
    )
  squares = jnp.sum(v**2, axis=-1)
  growth = squares - squares[:1]
  if attention == "linear":
    return rate_ratio * growth
  if attended is not None:
    # |v_k|^2 b-bar, summed over nodes: every token loses in proportion to its
    # mean attention, which keeps the sum of z where it was.
    growth -= _shared_growth(squares.sum(axis=-1), attended)
  # The correction has rate and temperature in it already: `flow` integrates it
  # with both.
  change = rate_ratio / (2 * temperature) * growth
  return change if correction is None else change - correction


def _shared_growth(
    norms: Float[Array, "S"], attended: Float[Array, "*S M"]
) -> Float[Array, "S M"]:
  """Integrates b-bar d(sum_k |v_k|^2)."""
  if attended.ndim == 1:
    return jnp.outer(norms - norms[0], attended)
  # The trapezoidal rule, as b-bar is known at the recorded times alone.
  middle = (attended[1:] + attended[:-1]) / 2
  steps = jnp.diff(norms)[:, None] * middle
  return jnp.pad(jnp.cumsum(steps, axis=0), ((1, 0), (0, 0)))


def check_invariant(
    attn_logits: Float[Array, "S Q M"],
    v: Float[Array, "S M F"],
    *,
    attention: dynamics.Attention,
    rate_ratio: Scalar = 1.0,
    temperature: Scalar = 1.0,
    query_weights: Float[Array, "Q"] | None = None,
    attended: Float[Array, "*S M"] | None = None,
    correction: Float[Array, "S M"] | None = None,
) -> InvariantCheck:
  """Holds Theorem 1 against any trajectory, a training run included.

  Args:
    attn_logits: z over time.
    v: U_C^T W over time, [S, M, F].
    attention: Kind of attention.
    rate_ratio: eta_z / eta_w.
    temperature: T.
    query_weights: See `measured_change`.
    attended: See `predicted_change`.
    correction: See `predicted_change`.

  Returns:
    Correlation, slope and relative error at each time.

  Raises:
    ValueError: As `predicted_change`.
  """
  measured = measured_change(
      attn_logits, attention=attention, query_weights=query_weights
  )
  predicted = predicted_change(
      v,
      attention=attention,
      rate_ratio=rate_ratio,
      temperature=temperature,
      attended=attended,
      correction=correction,
  )
  return InvariantCheck(
      jax.vmap(metrics.normalized_correlation)(measured, predicted),
      jax.vmap(metrics.slope)(measured, predicted),
      jax.vmap(metrics.relative_error)(measured, predicted),
  )
