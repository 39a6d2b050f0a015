"""Scan & Snap (https://arxiv.org/abs/2305.16380): attention, and what moves it.

One function per lemma, theorem or corollary, in the order of the derivation:
Lemmas 1 to 4, Theorems 1 and 2 and Corollary 2 here, how fast the decoder
learns in `growth`, what a token gains over another in `gains`. `theorems`
measures each of them and `flow` integrates the differential equations. Where
the paper's print and its derivation disagree, the code follows the derivation
and says so.

Symbols of the paper, used as names in all three:

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

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

Scalar = float | int | Num[Array, ""]


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
  # Absent tokens are set to 0 before exp, not after: inf times the weight 0
  # would be NaN, in the value or in the gradient.
  scores = weights * jnp.exp(jnp.where(present, shifted, 0))
  total = scores.sum(axis=-1)
  return scores / _to_rows(jnp.where(total > 0, total, 1), scores)


def l2_normalize(vectors: Float[Array, "*b M"]) -> Float[Array, "*b M"]:
  """Computes f = c / |c|_2; a zero vector stays zero, with zero gradient."""
  squared = jnp.sum(vectors**2, axis=-1)
  # The 1 is put in before the root, whose slope at 0 is infinite.
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
  # e_n - alpha_n, how far the prediction is off; then Y (e_n - alpha_n), which
  # is what the decoder sends back to attention.
  error = jax.nn.one_hot(label, f.size, dtype=f.dtype)
  error -= jax.nn.softmax(f @ decoder)
  g = decoder @ error
  # diag(c) / |c|_2 is diag(f), and P g = g - f (f^T g) needs no matrix P.
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
  # A K x K inverse, for the few classes of the theory; E is far from small in
  # the data of the paper, so no series in E would do.
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
  # F^T (I - E') e_n is dual to the features: f_n'^T of it is 1 for n' = n and 0
  # for all others, so that the other classes do not notice.
  direction = features[index] - decorrelation(features)[index] @ features
  return jnp.outer(direction, error)


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
  # The sum over n' of Theorem 1 has no term n' = n: what E' has on its diagonal
  # belongs to iota.
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
  # sum_n' beta_nn' f_n' of each class, then the projection f_n f_n^T - I row by
  # row: K M numbers where the outer products would be K M M.
  others = beta @ features
  along = jnp.sum(features * others, axis=-1, keepdims=True)
  rows = eta_z * speed * features * (features * along - others)
  size = features.shape[1]
  # Classes of one query move the same row of Z: add, not set.
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
  # By the symmetry that the corollary assumes, any two classes will do.
  overlap = features[0] @ features[1]
  return -eta_z * speed * features[0] ** 2 * (1 - overlap) * beta.sum()
