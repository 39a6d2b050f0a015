"""Scan & Snap (https://arxiv.org/abs/2305.16380): its laws as functions.

One function per lemma, theorem or corollary, in the order of the derivation;
`theorems` measures each of them and `flow` integrates the differential
equations. Where the paper's print and its derivation disagree, the code
follows the derivation and says so.

Symbols of the paper, used as names here:

  n, l, m    next token (class), contextual token, query token
  M, K       number of tokens (`num_tokens`) and of classes (`num_classes`)
  T          sequence length, of which T - 1 tokens are context
  Y, Z       decoder (row: input token, column: output token) and attention
             logits (row: query token), both [M, M]; z_m is row m of Z
  psi        the query token of a class: m = psi(n), here the array `query`
  c_n, f_n   attention that class n pays to each token, c_n ~ P(l|n) e^{z_ml},
             and its direction f_n = c_n / |c_n|_2; F stacks the f_n as rows
  alpha_n    softmax(Y^T f_n), the predicted distribution
  E, E'      F F^T - I and I - (I + E)^{-1}
  W          F Y, row n = Y^T f_n = w_n, the logits of class n
  zeta_n     (M / (M - 1)) (e_n - 1/M), the direction in which w_n grows
  h*, h      how far it has grown, in steps and in continuous time
  gamma      speed control; xi_n the pressure on the attention of class n
  chi, B_n   growth of the relative gain r, and the exponent that bounds it
  eta        learning rates eta_y and eta_z; nu = eta_y / eta_z

Each function computes in the float type of its array arguments, float32 or
float64; Python numbers alone take JAX's default. Training is sample by sample:
times count samples seen, and class n has been seen about t / K times.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

Scalar = float | int | Num[Array, ""]
Times = float | int | Num[Array, "*T"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
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


def attended(
    weights: Num[Array, "*b M"], attn_logits: Float[Array, "*b M"]
) -> Float[Array, "*b M"]:
  """Computes c, the share of attention that each token gets.

  c_l = w_l e^{z_l} / sum_l' w_l' e^{z_l'}: with token counts as w this is
  X^T b for a sequence, with P(l|n) its limit for long sequences (Lemma 2).

  Args:
    weights: Non-negative counts, frequencies or probabilities.
    attn_logits: The query's row z_m. Tokens of weight 0 have no influence.

  Returns:
    Shares that sum to 1, or all zero for an empty context.
  """
  present = weights > 0
  lowest = jnp.finfo(attn_logits.dtype).min
  top = jnp.max(attn_logits, axis=-1, where=present, initial=lowest)
  # The maximum cancels, so it needs no gradient; and it is taken off before
  # exp, as an absent token's logit may be far above it.
  top = jax.lax.stop_gradient(top)
  shifted = attn_logits - _to_rows(top, attn_logits)
  scores = weights * jnp.exp(jnp.where(present, shifted, 0))
  total = scores.sum(axis=-1)
  return scores / _to_rows(jnp.where(total > 0, total, 1), scores)


def l2_normalize(vectors: Float[Array, "*b M"]) -> Float[Array, "*b M"]:
  """Computes f = c / |c|_2; a zero vector stays zero, with zero gradient."""
  squared = jnp.sum(vectors**2, axis=-1)
  norm = jnp.sqrt(jnp.where(squared > 0, squared, 1))
  return vectors / _to_rows(norm, vectors)


def _to_rows(
    x: Float[Array, "*b"], like: Float[Array, "*b M"]
) -> Float[Array, "*b M"]:
  """Repeats one number per row.

  Without an axis of size 1 in between: XLA moves those about, and with them the
  rounding, differently for one device and for several.
  """
  return jax.lax.broadcast_in_dim(x, like.shape, range(x.ndim))


def class_features(
    probs: Float[Array, "K M"],
    attn_logits: Float[Array, "M M"],
    query: Int[Array, "K"],
) -> Float[Array, "K M"]:
  """Computes F, one row f_n per class, from P(l|n), Z and psi(n)."""
  return l2_normalize(attended(probs, attn_logits[query]))


def lemma1_gradients(
    decoder: Float[Array, "M M"],
    attn_logits: Float[Array, "M M"],
    counts: Num[Array, "M"],
    query: int | Int[Array, ""],
    label: int | Int[Array, ""],
) -> tuple[Float[Array, "M M"], Float[Array, "M M"]]:
  """Computes the ascent directions of one sample's log-likelihood (Lemma 1).

  dY = f (e_n - alpha)^T and, in row m alone,
  dz_m = diag(c) P / |c|_2 Y (e_n - alpha) with P = I - f f^T.

  Args:
    decoder: Y.
    attn_logits: Z.
    counts: How often each token occurs in the context; frequencies do too.
    query: Token m, the last of the sequence, which is not in `counts`.
    label: Token n to predict.

  Returns:
    (dY, dZ) at learning rate 1. The rows of both sum to zero.
  """
  f = l2_normalize(attended(counts, attn_logits[query]))
  error = jax.nn.one_hot(label, f.size, dtype=f.dtype)
  error -= jax.nn.softmax(f @ decoder)
  g = decoder @ error
  dz = f * (g - f * (f @ g))
  return jnp.outer(f, error), jnp.zeros_like(attn_logits).at[query].set(dz)


def frequency_bound(seq_len: int, delta: float) -> float:
  """Bounds |frequency of l in the context - P(l|n)| (Lemma 2, finite T).

  The deviation exceeds sqrt(ln(2/delta) / (2 (T - 1))) with probability at
  most delta, for each token.

  Args:
    seq_len: T, at least 2.
    delta: Failure probability in (0, 1).

  Returns:
    The largest deviation.

  Raises:
    ValueError: If an argument is out of range.
  """
  if seq_len < 2 or not 0 < delta < 1:
    raise ValueError(f"Need T >= 2, 0 < delta < 1: {seq_len=}, {delta=}.")
  return math.sqrt(math.log(2 / delta) / (2 * (seq_len - 1)))


def correlation(features: Float[Array, "K M"]) -> Float[Array, "K K"]:
  """Computes E = F F^T - I, the overlaps between classes (Assumption 2)."""
  return features @ features.T - jnp.eye(len(features), dtype=features.dtype)


def decorrelation(features: Float[Array, "K M"]) -> Float[Array, "K K"]:
  """Computes E' = I - (I + E)^{-1}, with eigenvalues lambda / (1 + lambda).

  Differs from the paper: the notation list of its appendix prints the
  opposite sign, with which neither Lemma 3 nor xi_n > 0 holds.

  Args:
    features: F, with linearly independent rows: else I + E is singular, and the
      result is not finite or means nothing. So wherever E' enters below.

  Returns:
    E', symmetric.
  """
  identity = jnp.eye(len(features), dtype=features.dtype)
  return identity - jnp.linalg.inv(identity + correlation(features))


def modified_decoder_gradient(
    decoder: Float[Array, "M M"],
    features: Float[Array, "K M"],
    index: int | Int[Array, ""],
    label: int | Int[Array, ""],
) -> Float[Array, "M M"]:
  """Computes the decoupled decoder update of Lemma 3, at learning rate 1.

  dY = (f_n - F^T E' e_n) (e_n - alpha_n)^T moves row n of W = F Y alone.

  Args:
    decoder: Y.
    features: F.
    index: n as a row of F.
    label: n as a token.

  Returns:
    dY.
  """
  error = jax.nn.one_hot(label, len(decoder), dtype=decoder.dtype)
  error -= jax.nn.softmax(features[index] @ decoder)
  direction = features[index] - decorrelation(features)[index] @ features
  return jnp.outer(direction, error)


def zeta(
    label: Int[Array, "K"], num_tokens: int, dtype=float
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

  def step(x, _):  # x = M h*: h* itself is too small to add up in float32.
    return x + num_tokens * eta_y / (num_tokens - 1 + jnp.exp(x)), x

  start = jnp.zeros((), jnp.result_type(float, eta_y))
  return jax.lax.scan(step, start, length=num_steps + 1)[1] / num_tokens


def h_continuous(
    t: Times, *, num_tokens: int, eta_y: Scalar
) -> Float[Array, "*T"]:
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

  def newton(_, x):
    excess = jnp.expm1(x) + (num_tokens - 1) * x - y
    return x - excess / (jnp.exp(x) + num_tokens - 1)

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


def scanning_end(run: Run) -> Scalar:
  """Computes t0' = K ln M / eta_y, until when gamma ~ eta_y t/K (Lemma 8)."""
  return run.num_classes * math.log(run.num_tokens) / run.eta_y


def snapping_start(run: Run) -> Scalar:
  """Computes t0 = 2 (1 + omega_1) K ln M / eta_y (Lemma 8)."""
  return 2 * (1 + omega_1(run.num_tokens)) * scanning_end(run)


def gamma(t: Times, run: Run) -> Float[Array, "*T"]:
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
  return others * h * (others / (others + jnp.exp(run.num_tokens * h)))


def gamma_early(t: Times, run: Run) -> Float[Array, "*T"]:
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


def gamma_late(t: Times, run: Run) -> Float[Array, "*T"]:
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


def gamma_peak(run: Run) -> tuple[Scalar, float]:
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


def iota_beta(
    features: Float[Array, "K M"],
) -> tuple[Float[Array, "K"], Float[Array, "K K"]]:
  """Computes Theorem 1's coefficients to leading order.

  iota_n = 1 - E'_nn and beta_nn' = E'_nn', with beta_nn = 0. Both are exact
  to O(1/M) and to the spread of the class counts, O(K / sqrt(t)).

  Args:
    features: F.

  Returns:
    (iota, beta).
  """
  prime = decorrelation(features)
  iota = 1 - jnp.diagonal(prime)
  return iota, jnp.fill_diagonal(prime, 0, inplace=False)


def backpropagated_gradient(
    features: Float[Array, "K M"], speed: Scalar
) -> Float[Array, "K M"]:
  """Computes g_n = gamma (iota_n f_n - sum_n' beta_nn' f_n') (Theorem 1).

  It stands for Y (e_n - alpha_n), what the decoder sends back to attention.

  Args:
    features: F.
    speed: gamma(t).

  Returns:
    One row per class.
  """
  iota, beta = iota_beta(features)
  return speed * (iota[:, None] * features - beta @ features)


def xi(features: Float[Array, "K M"], speed: Scalar) -> Float[Array, "K"]:
  """Computes xi_n = gamma sum_n' beta_nn' f_n^T f_n' (Theorem 1 a).

  Positive as soon as class n overlaps with another: it equals -gamma E'_nn.

  Args:
    features: F.
    speed: gamma(t).

  Returns:
    One pressure per class, at least 0.
  """
  _, beta = iota_beta(features)
  return speed * jnp.sum(beta * (features @ features.T), axis=-1)


def attention_velocity(
    features: Float[Array, "K M"],
    query: Int[Array, "K"],
    speed: Scalar,
    eta_z: Scalar = 1.0,
) -> Float[Array, "M M"]:
  """Computes dZ/dt (Lemma 4).

  dz_m/dt = eta_z gamma sum_{n: psi(n) = m} diag(f_n)
            sum_{n' != n} beta_nn' (f_n f_n^T - I) f_n'.

  Args:
    features: F.
    query: psi(n).
    speed: gamma(t).
    eta_z: Learning rate of Z.

  Returns:
    dZ/dt, zero in rows of tokens that are no query; every row sums to zero.
  """
  _, beta = iota_beta(features)
  others = beta @ features
  along = jnp.sum(features * others, axis=-1, keepdims=True)
  rows = eta_z * speed * features * (features * along - others)
  size = features.shape[1]
  return jnp.zeros((size, size), features.dtype).at[query].add(rows)


def distinct_velocity(
    features: Float[Array, "K M"], speed: Scalar, eta_z: Scalar = 1.0
) -> Float[Array, "K M"]:
  """Computes dz_ml/dt = eta_z f_nl^2 xi_n > 0 (Theorem 2 a).

  Args:
    features: F.
    speed: gamma(t).
    eta_z: Learning rate of Z.

  Returns:
    Entry (n, l) is the velocity of l in row psi(n), for tokens l that occur in
    class n alone; entries of other tokens mean nothing.
  """
  return eta_z * features**2 * xi(features, speed)[:, None]


def common_velocity(
    features: Float[Array, "K M"], speed: Scalar, eta_z: Scalar = 1.0
) -> Float[Array, "K M"]:
  """Computes dz_ml/dt = -eta_z sum_n (1 - f_nl^2) xi_n < 0 (Theorem 2 b).

  Args:
    features: F.
    speed: gamma(t).
    eta_z: Learning rate of Z.

  Returns:
    Entry (n, l) is the part of class n, to be summed over the classes of one
    query; it holds for l the only token that classes share.
  """
  return -eta_z * (1 - features**2) * xi(features, speed)[:, None]


def symmetric_common_velocity(
    features: Float[Array, "K M"], speed: Scalar, eta_z: Scalar = 1.0
) -> Float[Array, "M"]:
  """Computes dz_ml/dt of each of several common tokens (Corollary 2).

  All classes share one query and have P(l|n) = rho_l on common tokens, equal
  multisets of probabilities on distinct ones, and Z(0) = 0: then
  f_n^T f_n' = o for all n != n' and dz_ml/dt = -eta_z f_l^2 (1 - o) gamma
  sum_nn' beta_nn' < 0.

  Args:
    features: F of two classes or more.
    speed: gamma(t).
    eta_z: Learning rate of Z.

  Returns:
    Velocities in the row of the query; those of distinct tokens mean nothing.

  Raises:
    ValueError: If there are fewer than two classes.
  """
  if len(features) < 2:
    raise ValueError(f"Need two classes, got features {features.shape}.")
  _, beta = iota_beta(features)
  overlap = features[0] @ features[1]
  return -eta_z * speed * features[0] ** 2 * (1 - overlap) * beta.sum()


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
  return (attn_weights[..., token] / attn_weights[..., other]) ** 2 - 1


def gain_growth(
    attn_logit: Scalar | Float[Array, "*T"], initial: Scalar
) -> Float[Array, "*T"]:
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
) -> tuple[Float[Array, "*T"], Float[Array, "*T"]]:
  """Bounds e^{2 f(0)^2 B} <= chi_l0 <= e^{2 B} (Theorem 3).

  Args:
    feature: f_nl0(0) of the distinct token l0 that leads its class.
    exponent: B_n(t), the integral of eta_z xi_n.

  Returns:
    (lower, upper). They hold while all common tokens of n lose attention.
  """
  exponent = jnp.asarray(exponent)
  return jnp.exp(2 * feature**2 * exponent), jnp.exp(2 * exponent)


def _exponent(h: Float[Array, "*T"], run: Run) -> Float[Array, "*T"]:
  """Computes 1/4 ln[1 + 2 (eta_z / eta_y) K (M - 1)^2 h^2 / C0]."""
  growth = 2 * run.num_classes * run.eta_z / run.eta_y
  return jnp.log1p(growth / run.c0 * ((run.num_tokens - 1) * h) ** 2) / 4


def gain_exponent(t: Times, run: Run) -> Float[Array, "*T"]:
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
  h = h_continuous(
      t / run.num_classes, num_tokens=run.num_tokens, eta_y=run.eta_y
  )
  return _exponent(h, run)


def gain_exponent_as_printed(t: Times, run: Run) -> Float[Array, "*T"]:
  """Computes the paper's form of Theorem 4, which is B_n + 1/4 ln C0.

  Args:
    t: Samples seen, at least 0.
    run: All of it matters; c0 is positive.

  Returns:
    The printed B_n, which starts at 1/4 ln C0.
  """
  return gain_exponent(t, run) + jnp.log(run.c0) / 4


def scanning_exponent(t: Times, run: Run) -> Float[Array, "*T"]:
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


def snapping_exponent(t: Times, run: Run) -> Float[Array, "*T"]:
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


def num_steps_bound(epsilon: float, run: Run) -> Scalar:
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
  return (features - decorrelation(features) @ features).T @ projected


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
