"""How fast the decoder learns: Lemmas 5 to 9, Corollary 1, Theorem 5.

Under the modified update of Lemma 3 the logits w_n of a class grow along one
fixed direction zeta_n, so that one number h says how far. Its growth is linear
until t0' (scanning) and logarithmic after t0 (snapping); gamma is the speed
that it lends to attention (https://arxiv.org/abs/2305.16380).

Symbols as in `dynamics`. Times count samples of all classes unless it is said
otherwise.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from scansnap_jax import dynamics
from scansnap_jax.dynamics import Scalar

Times = float | int | Num[Array, "*S"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TheoryRun:
  """What the laws of one training run depend on.

  Attributes:
    num_tokens: M, at least 4.
    num_classes: K, at least 1 and at most M.
    eta_y: Learning rate of Y.
    eta_z: Learning rate of Z, much smaller than eta_y in the theory.
    c0: C0 = rho_0^4 / K of Theorem 4, where rho_0 is the constant norm of the
      unnormalised attention P(l|n) e^{z_ml}.
  """

  num_tokens: int = dataclasses.field(metadata={"static": True})
  num_classes: int = dataclasses.field(metadata={"static": True})
  eta_y: Scalar
  eta_z: Scalar = 0.0
  c0: Scalar = 1.0


def zeta(
    label: Int[Array, "K"], num_tokens: int, dtype: jax.typing.DTypeLike = float
) -> Float[Array, "K M"]:
  """Computes zeta_n = (M / (M - 1)) (e_n - 1/M) for each class (Lemma 5)."""
  one_hot = jax.nn.one_hot(label, num_tokens, dtype=dtype)
  return (one_hot - 1 / num_tokens) * (num_tokens / (num_tokens - 1))


def projected_decoder(
    h: Scalar | Float[Array, "K"], label: Int[Array, "K"], num_tokens: int
) -> Float[Array, "K M"]:
  """Computes W, whose rows are w_n = (M - 1) h_n zeta_n (Lemma 5)."""
  h = jnp.broadcast_to(h, label.shape)[:, None]
  return (num_tokens - 1) * h * zeta(label, num_tokens, h.dtype)


def prediction_error(
    h: Scalar | Float[Array, "K"], label: Int[Array, "K"], num_tokens: int
) -> Float[Array, "K M"]:
  """Computes e_n - alpha_n = (M-1) / (M-1 + e^{M h_n}) zeta_n (Lemma 5)."""
  h = jnp.broadcast_to(h, label.shape)[:, None]
  others = num_tokens - 1
  # 1 - alpha_nn by Lemma 5; where e^{M h} overflows to infinity it is 0, as it
  # should be.
  size = others / (others + jnp.exp(num_tokens * h))
  return size * zeta(label, num_tokens, h.dtype)


def h_discrete(
    num_steps: int, *, num_tokens: int, eta_y: Scalar
) -> Float[Array, "steps"]:
  """Computes h*(0), ..., h*(num_steps) of a class seen that often (Lemma 5).

  h*(s) = h*(s-1) + eta_y / (M - 1 + exp(M h*(s-1))) with h*(0) = 0.

  Args:
    num_steps: How often the class is seen, at least 0.
    num_tokens: M, at least 2.
    eta_y: Learning rate of Y.

  Returns:
    h*, increasing.
  """

  # x = M h*: h* itself is too small to add up in float32.
  def step(
      x: Float[Array, ""], _: None
  ) -> tuple[Float[Array, ""], Float[Array, ""]]:
    return x + num_tokens * eta_y / (num_tokens - 1 + jnp.exp(x)), x

  # A rate given as float32 or float64 keeps the recursion in its type.
  start = jnp.zeros((), jnp.result_type(float, eta_y))
  return jax.lax.scan(step, start, length=num_steps + 1)[1] / num_tokens


def h_continuous(
    t: Times, *, num_tokens: int, eta_y: Scalar
) -> Float[Array, "*S"]:
  """Computes h(t), the root of e^{M h} + (M-1) M h = M eta_y t + 1 (Lemma 6).

  Args:
    t: How often the class has been seen, at least 0.
    num_tokens: M, at least 2.
    eta_y: Learning rate of Y.

  Returns:
    h, accurate to rounding for any t; dh/dt = eta_y / (M - 1 + e^{M h}).
  """
  y = jnp.asarray(num_tokens * eta_y * t)
  # Both starts lie right of the root of a convex increasing function of
  # x = M h: Newton descends to it, and e^x <= 1 + y cannot overflow.
  x = jnp.minimum(jnp.log1p(y), y / num_tokens)

  def newton(_: Int[Array, ""], x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    # expm1, as e^x - 1 loses all digits of a small x.
    excess = jnp.expm1(x) + (num_tokens - 1) * x - y
    return x - excess / (jnp.exp(x) + num_tokens - 1)

  # Newton doubles the digits from the right start on: 10 steps reach rounding
  # for M from 2 to 1e6 and any t, also in float64.
  return jax.lax.fori_loop(0, 10, newton, x) / num_tokens


def h_gap_bound(*, num_tokens: int, eta_y: float) -> float:
  """Bounds the gap of Lemma 7: 0 <= h*(s) - h(s) <= 2 eta_y / M."""
  return 2 * eta_y / num_tokens


def omega_1(num_tokens: int) -> float:
  """Solves (1 + w) ln M = ln((M - 1) (1 + w) ln M) for w (Lemma 8).

  Its size is Theta(ln ln M / ln M).

  Raises:
    ValueError: If M < 4, where no root exists.
  """
  if num_tokens < 4:
    raise ValueError(f"omega_1 needs M >= 4, got {num_tokens}.")
  u = 2 * math.log(num_tokens)  # u = (1 + w) ln M, right of the larger root.
  for _ in range(30):  # Newton on u - ln u - ln(M - 1), convex.
    u -= (u - math.log(u) - math.log(num_tokens - 1)) / (1 - 1 / u)
  return u / math.log(num_tokens) - 1


def scanning_end(run: TheoryRun) -> Scalar:
  """Computes t0' = K ln M / eta_y, until when gamma ~ eta_y t/K (Lemma 8)."""
  return run.num_classes * math.log(run.num_tokens) / run.eta_y


def snapping_start(run: TheoryRun) -> Scalar:
  """Computes t0 = 2 (1 + omega_1) K ln M / eta_y (Lemma 8)."""
  return 2 * (1 + omega_1(run.num_tokens)) * scanning_end(run)


def gamma(t: Times, run: TheoryRun) -> Float[Array, "*S"]:
  """Computes the speed control (Theorem 1).

  gamma(t) = (M - 1)^2 h(t/K) / (M - 1 + exp(M h(t/K))).

  Args:
    t: Samples seen, at least 0.
    run: M, K and eta_y matter.

  Returns:
    gamma, which rises from 0 to `gamma_peak` and falls back towards 0.
  """
  others = run.num_tokens - 1
  h = h_continuous(
      t / run.num_classes, num_tokens=run.num_tokens, eta_y=run.eta_y
  )
  # The last factor is 1 - alpha_nn, and 0 where the exponential overflows.
  return others * h * (others / (others + jnp.exp(run.num_tokens * h)))


def gamma_early(t: Times, run: TheoryRun) -> Float[Array, "*S"]:
  """Computes gamma's leading order before t0' (Lemma 9), an upper bound.

  (1 - 1/M)^2 eta_y t / K; gamma itself is at least a quarter of it there.

  Args:
    t: Samples seen, from 0 to t0'.
    run: M, K and eta_y matter.

  Returns:
    The leading order of gamma.
  """
  s = jnp.asarray(run.eta_y * t / run.num_classes)
  return (1 - 1 / run.num_tokens) ** 2 * s


def gamma_late(t: Times, run: TheoryRun) -> Float[Array, "*S"]:
  """Computes gamma's leading order after t0 (Lemma 9), right to a factor 2.

  (1 - 1/M)^2 ln(M s) / s with s = eta_y t / K.

  Args:
    t: Samples seen, t0 or more. Not defined at 0, negative before s = 1/M.
    run: M, K and eta_y matter.

  Returns:
    The leading order of gamma.
  """
  s = jnp.asarray(run.eta_y * t / run.num_classes)
  return (1 - 1 / run.num_tokens) ** 2 * jnp.log(run.num_tokens * s) / s


def gamma_peak(run: TheoryRun) -> tuple[Scalar, float]:
  """Computes when gamma is largest, and how large.

  d gamma / dt = 0 gives w e^w = (M - 1)/e for w = M h - 1: the peak is
  (1 - 1/M) w, whatever the rate, at about 0.816 t0' for M = 1000. This closed
  form is not in the paper.

  Args:
    run: M, K and eta_y matter.

  Returns:
    (t, gamma(t)) of the peak, t in samples seen.
  """
  others = run.num_tokens - 1
  w = math.log(run.num_tokens)
  for _ in range(30):  # Newton on w + ln w - ln(M - 1) + 1.
    w -= (w + math.log(w) - math.log(others) + 1) / (1 + 1 / w)
  y = others / w - 1 + others * (1 + w)  # e^{M h} = (M - 1) / w there.
  time = run.num_classes * y / (run.num_tokens * run.eta_y)
  return time, others / run.num_tokens * w


def num_steps_bound(epsilon: float, run: TheoryRun) -> Scalar:
  """Bounds the steps until |e_n - alpha_n|_2 <= epsilon (Corollary 1).

  K/eta_y (1/epsilon + ln(M/epsilon)), which is O(K/(epsilon eta_y) ln(M/eps)):
  the norm is at most M / (M - 1 + e^{M h}), and Lemma 6 gives the time at
  which e^{M h} = M / epsilon.

  Args:
    epsilon: Largest error left, positive.
    run: M, K and eta_y matter.

  Returns:
    Samples seen, of all classes together.

  Raises:
    ValueError: If epsilon is not positive.
  """
  if epsilon <= 0:
    raise ValueError(f"epsilon must be positive, got {epsilon}.")
  seen = 1 / epsilon + math.log(run.num_tokens / epsilon)
  return run.num_classes * seen / run.eta_y


def decoder_closed_form(
    features: Float[Array, "K M"],
    label: Int[Array, "K"],
    h: Scalar,
    theta: Float[Array, "K"],
) -> Float[Array, "M M"]:
  """Computes Y = F^T (I - E') (I + Theta) W (Theorem 5).

  Args:
    features: F.
    label: Token of each class.
    h: h(ceil(N / K)) after N steps, common to all classes.
    theta: Relative deviations h*(count of n) / h - 1, the diagonal of Theta.

  Returns:
    Y; F^T (I - E') is the transposed pseudo-inverse of F^T.
  """
  projected = projected_decoder(h * (1 + theta), label, features.shape[1])
  return (features - dynamics.decorrelation(features) @ features).T @ projected


def theta_bound(num_steps: int, num_classes: int, delta: float) -> float:
  """Bounds |theta_n| <~ K / sqrt(N) sqrt(ln(K / delta)) (Theorem 5).

  Args:
    num_steps: N, samples seen, at least 1.
    num_classes: K, at least 1.
    delta: Failure probability in (0, 1), for all classes together.

  Returns:
    The bound, up to the constant that the theorem leaves open.

  Raises:
    ValueError: If an argument is out of range.
  """
  if num_steps < 1 or num_classes < 1 or not 0 < delta < 1:
    raise ValueError(
        "Need N >= 1, K >= 1, 0 < delta < 1:"
        f" {num_steps=}, {num_classes=}, {delta=}."
    )
  size = num_classes / math.sqrt(num_steps)
  return size * math.sqrt(math.log(num_classes / delta))
