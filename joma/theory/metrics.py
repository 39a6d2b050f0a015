"""What is read off a multilayer run: sparsity, rank, agreement, latents.

JoMA (https://arxiv.org/abs/2310.00535) plots attention entropy, the stable rank
of the lower MLP layer (Figure 7), normalized correlations (Figure 2) and the
correlation of hidden nodes with latent variables (Table 1).

Letters as in `joma.theory`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num
import numpy as np


def attention_entropy(attn_logits: Float[Array, "*b M"]) -> Float[Array, "*b"]:
  """Computes the entropy of softmax(attn_logits), in nats: from 0 to ln M."""
  log_probs = jax.nn.log_softmax(attn_logits, axis=-1)
  return -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)


def stable_rank(weights: Float[Array, "*b D F"]) -> Float[Array, "*b"]:
  """Computes |W|_F^2 / |W|_2^2, from 1 to min(D, F); 0 for a zero matrix.

  The eigenvalues of the smaller of W W^T and W^T W are the squared singular
  values, many times sooner than those of W.
  """
  is_wide = weights.shape[-2] <= weights.shape[-1]
  gram = jnp.einsum(
      "...DF,...EF->...DE" if is_wide else "...DF,...DG->...FG",
      weights,
      weights,
      precision="highest",
  )
  # |W|_F^2 is the sum of the eigenvalues, |W|_2^2 the largest one.
  trace = jnp.trace(gram, axis1=-2, axis2=-1)
  return _ratio(trace, jnp.linalg.eigvalsh(gram)[..., -1])


def normalized_correlation(
    measured: Float[Array, "E"], predicted: Float[Array, "E"]
) -> Float[Array, ""]:
  """Computes the cosine of two vectors after their means are removed.

  Args:
    measured: One vector.
    predicted: The other.

  Returns:
    From -1 to 1, 0 if either vector is constant. Blind to scale and offset.
  """
  a, b = measured - measured.mean(), predicted - predicted.mean()
  return _cosine(a[:, None], b[:, None])[0, 0]


def slope(
    measured: Float[Array, "E"], predicted: Float[Array, "E"]
) -> Float[Array, ""]:
  """Computes the least-squares slope of `measured` on `predicted`.

  Args:
    measured: Dependent variable.
    predicted: Independent variable.

  Returns:
    cov(measured, predicted) / var(predicted), 0 if `predicted` is constant.
  """
  b = predicted - predicted.mean()
  return _ratio((measured - measured.mean()) @ b, b @ b)


def relative_error(
    measured: Float[Array, "E"], predicted: Float[Array, "E"]
) -> Float[Array, ""]:
  """Computes |predicted - measured| / |measured|, means not removed.

  Args:
    measured: Vector to predict.
    predicted: The prediction.

  Returns:
    At least 0; 0 where both are equal, infinite where only `measured` is 0, NaN
    where a number is missing.
  """
  error = jnp.linalg.norm(predicted - measured)
  return jnp.where(error == 0, 0, error / jnp.linalg.norm(measured))


class LatentScores(NamedTuple):
  """How well the best hidden node follows each latent variable.

  Attributes:
    pearson: Largest correlation over hidden nodes [P], means removed.
    cosine: The same without removing means [P]; large for anything positive.
    is_used: Whether the latent differs between samples [P]: the others score 0
      and belong in no average.
  """

  pearson: Float[Array, "P"]
  cosine: Float[Array, "P"]
  is_used: Bool[Array, "P"]


def latent_scores(
    activations: Float[Array, "B W F"], latents: Num[Array, "B P"]
) -> LatentScores:
  """Computes the latent correlation scores of one layer (Table 1).

  Activations are max-pooled over positions and correlated with each latent over
  samples; the best of F nodes counts, signed as it is. Over few distinct
  sequences the best of many nodes scores high untrained: report that floor,
  and scores for shuffled labels, beside every score.

  Args:
    activations: Hidden nodes, after the activation.
    latents: Activity of each latent, 0 or 1.

  Returns:
    Scores per latent; average them with `mean_score`.
  """
  # A node may follow a latent at any position: the largest one counts.
  pooled = activations.max(axis=1)
  activity = latents.astype(pooled.dtype)
  centred = lambda x: x - x.mean(axis=0, keepdims=True)
  return LatentScores(
      _cosine(centred(pooled), centred(activity)).max(axis=0),
      _cosine(pooled, activity).max(axis=0),
      activity.max(axis=0) > activity.min(axis=0),
  )


def mean_score(
    scores: Float[Array, "P"], is_used: Bool[Array, "P"]
) -> Float[Array, ""]:
  """Averages scores over the latents in use; 0 if there is none."""
  return _ratio(jnp.where(is_used, scores, 0).sum(), 1.0 * is_used.sum())


def _cosine(
    a: Float[Array, "B F"], b: Float[Array, "B P"]
) -> Float[Array, "F P"]:
  norms = jnp.outer(jnp.linalg.norm(a, axis=0), jnp.linalg.norm(b, axis=0))
  return _ratio(a.T @ b, norms)


def _ratio(
    numerator: Float[Array, "*b"], denominator: float | Float[Array, "*b"]
) -> Float[Array, "*b"]:
  """Divides, with 0 wherever the denominator is 0; NaN stays NaN."""
  safe = jnp.where(denominator == 0, 1, denominator)
  return jnp.where(denominator == 0, 0, numerator / safe)


class Rise(NamedTuple):
  """The way of a curve down and up again.

  Attributes:
    fall: How far the curve had come down from its start before the rise.
    rise: Largest height above the least value so far, 0 for a falling curve.
    lowest: Index of the least value before that height.
  """

  fall: float
  rise: float
  lowest: int


def largest_rise(curve: Float[np.ndarray, "S"]) -> Rise:
  """Finds the largest rise after a fall; values that are not finite end it."""
  is_finite = np.isfinite(curve)
  curve = np.asarray(curve)[: None if is_finite.all() else is_finite.argmin()]
  # Measured from the least value so far, or the fall before a rise would be
  # missed where a curve starts high.
  least = np.minimum.accumulate(curve)
  top = int(np.argmax(curve - least))
  lowest = int(np.argmin(curve[: top + 1]))
  return Rise(
      float(curve[0] - curve[lowest]), float(curve[top] - curve[lowest]), lowest
  )
