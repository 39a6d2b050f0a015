"""What is read off attention: sparsity, common tokens, recall, phases.

All are functions of c_n, the attended distribution of class n (Scan & Snap,
Section 3.2), with the true P(l|n):

  c_{l|n} = P(l|n) e^{z_ml} / sum_l' P(l'|n) e^{z_ml'},   m = psi(n).

Entropies are in nats. Letters as in `scansnap_jax`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from scansnap_jax import dynamics


def attended_distribution(
    attn_logits: Float[Array, "M M"],
    probs: Float[Array, "K M"],
    query: Int[Array, "K"],
) -> Float[Array, "K M"]:
  """Computes c_n of every class from the true P(l|n).

  Args:
    attn_logits: Z.
    probs: P(l|n), zero where a token never occurs.
    query: psi(n), the query token of each class.

  Returns:
    c_n, one row per class that sums to 1.
  """
  return dynamics.attended(probs, attn_logits[query])


def entropy(probs: Float[Array, "*b M"]) -> Float[Array, "*b"]:
  """Computes -sum_l p_l ln p_l, with 0 ln 0 = 0: from 0 to ln M."""
  return -jax.scipy.special.xlogy(probs, probs).sum(axis=-1)


def distinct_entropy(
    attended: Float[Array, "K M"], is_distinct: Bool[Array, "K M"]
) -> Float[Array, ""]:
  """Computes how widely attention spreads over distinct tokens (Figure 6).

  Mean over classes of the entropy of c_n restricted to the distinct tokens of n
  and renormalized. The paper does not define it; this definition reproduces the
  published table (docs/theory.md).

  Args:
    attended: c_n.
    is_distinct: True where token l is distinct for class n.

  Returns:
    Nats, from 0 to ln(number of distinct tokens of a class).
  """
  # Renormalized, so that attention that leaves distinct tokens for common ones
  # does not count as sparse.
  mass = jnp.where(is_distinct, attended, 0)
  total = mass.sum(axis=-1, keepdims=True)
  return entropy(mass / jnp.where(total > 0, total, 1)).mean()


def common_mass(
    attended: Float[Array, "K M"], is_common: Bool[Array, "K M"]
) -> Float[Array, ""]:
  """Computes the attention on common tokens, a mean over classes.

  Args:
    attended: c_n.
    is_common: True where token l is common to class n and another.

  Returns:
    A share in [0, 1].
  """
  return jnp.where(is_common, attended, 0).sum(axis=-1).mean()


def distinct_recall(
    attended: Float[Array, "K M"],
    is_distinct: Bool[Array, "K M"],
    thresholds: Float[Array, "S"],
) -> Float[Array, "S"]:
  """Computes the fraction of distinct tokens with c_{l|n} above a threshold.

  The mean over classes of the fraction of the class (Figures 11 and 12).

  Args:
    attended: c_n.
    is_distinct: True where token l is distinct for class n; every class needs
      one.
    thresholds: Attention to exceed, in [0, 1].

  Returns:
    A fraction in [0, 1] for each threshold.
  """
  # Mean over classes last: classes may have different numbers of distinct
  # tokens, and count alike.
  above = attended[:, :, None] > thresholds[None, None, :]
  hits = (above & is_distinct[:, :, None]).sum(axis=1)
  return (hits / is_distinct.sum(axis=1)[:, None]).mean(axis=0)


def leading_rank(
    attended: Float[Array, "K M"],
    probs: Float[Array, "K M"],
    is_distinct: Bool[Array, "K M"],
) -> Int[Array, "K"]:
  """Finds which distinct token of each class has the most attention.

  Args:
    attended: c_n.
    probs: P(l|n).
    is_distinct: True where token l is distinct for class n.

  Returns:
    Its rank by P(l|n) among the distinct tokens: 1 is the most frequent one.
  """
  own = jnp.where(is_distinct, attended, -1.0).argmax(axis=1)
  frequency = jnp.where(is_distinct, probs, -1.0)
  of_leader = jnp.take_along_axis(frequency, own[:, None], axis=1)
  return 1 + (frequency > of_leader).sum(axis=1)


def snapping_time(
    times: Float[Array, "S"], growth: Float[Array, "S"]
) -> Float[Array, ""]:
  """Computes when attention snaps: when a growing quantity grows fastest.

  Applied to the relative gain or to B_n(t) it separates scanning (growth speeds
  up) from snapping (growth slows down), Theorem 4.

  Args:
    times: Increasing times in any unit, at least three of them.
    growth: The quantity at these times.

  Returns:
    The midpoint of the interval of steepest growth, in the unit of `times`.
  """
  # Slopes, not differences: times may be spaced geometrically.
  slopes = jnp.diff(growth) / jnp.diff(times)
  steepest = jnp.argmax(slopes)
  return (times[steepest] + times[steepest + 1]) / 2
