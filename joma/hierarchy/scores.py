"""How well single hidden nodes match single latents: the scores of Table 1.

The score of a latent is the largest correlation, over the hidden nodes of the
block of its level, between the node's activation, pooled over the sequence by
its maximum, and whether the class holds the latent (0 or 1)
(https://arxiv.org/abs/2310.00535, Table 1). The paper's code draws 1280
sequences; here every class counts once, which is their limit.

The largest of hundreds of correlations over tens of sequences is high for any
latents and any network, so that a score says little without its floor:

* the score of the network before training;
* `shuffled`, the score against latents whose activity is permuted over the
  classes. It keeps how many classes hold a latent and forgets which. (Training
  on permuted labels is no floor: with one sequence per class it is the same
  problem with other names for the classes.)
* scores on combinations of latents that no class has: `unseen` is that of the
  best node there, `transferred` that of the node chosen on the classes, with no
  maximum to inflate it.

Letters as in `joma.hierarchy`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

# A node whose deviation is this little of its size is constant up to rounding.
_LEAST_DEVIATION = 1e-5


class Scores(NamedTuple):
  """Scores of the latents of one level, each in [-1, 1].

  Attributes:
    own: On the classes.
    shuffled: Mean over permutations.
    unseen: On unseen combinations.
    transferred: Of the nodes that `own` found, on unseen combinations.
  """

  own: Float[Any, "*r N"]
  shuffled: Float[Any, "*r N"]
  unseen: Float[Any, "*r N"]
  transferred: Float[Any, "*r N"]


def pool(hidden: Float[Array, "B T F"]) -> Float[Array, "B F"]:
  """The largest activation over positions."""
  return hidden.max(axis=1)


def correlations(
    pooled: Float[Array, "B F"],
    activity: Bool[Array, "B N"],
    weights: Float[Array, "B"] | None = None,
) -> Float[Array, "N F"]:
  """Pearson correlation of each latent with each node.

  Args:
    pooled: Activations.
    activity: Which latents each sequence holds.
    weights: Of the sequences, with sum 1; equal by default.

  Returns:
    Correlations; 0 where a node or a latent is constant.
  """
  if weights is None:
    weights = jnp.full(pooled.shape[:1], 1 / pooled.shape[0], pooled.dtype)
  nodes = _standardize(pooled, weights)
  latents = _standardize(activity.astype(pooled.dtype), weights)
  return jnp.einsum("BN,BF,B->NF", latents, nodes, weights)


def _standardize(
    values: Float[Array, "B X"], weights: Float[Array, "B"]
) -> Float[Array, "B X"]:
  """Mean 0 and variance 1 of each column; zeros if it is constant."""
  centered = values - weights @ values[None]
  variance = weights @ centered**2
  # Relative to the size: rounding of a constant node would otherwise be blown
  # up to a correlation.
  is_constant = variance <= _LEAST_DEVIATION**2 * (weights @ values**2)
  scale = jax.lax.rsqrt(jnp.where(is_constant, 1, variance))
  return centered * jnp.where(is_constant, 0, scale)[None]


def score(
    key: Key[Array, ""],
    pooled: Float[Array, "K F"],
    activity: Bool[Array, "K N"],
    unseen_pooled: Float[Array, "B F"],
    unseen_activity: Bool[Array, "B N"],
    unseen_weights: Float[Array, "B"],
    *,
    num_shuffles: int,
) -> Scores:
  """Scores of the latents of one level.

  Args:
    key: Of the permutations.
    pooled: Activations of the level's block on the classes.
    activity: Which latents the classes hold.
    unseen_pooled: Activations on unseen combinations.
    unseen_activity: Which latents those hold.
    unseen_weights: Of the unseen combinations, with sum 1.
    num_shuffles: W.
  """
  found = correlations(pooled, activity)
  unseen = correlations(unseen_pooled, unseen_activity, unseen_weights)
  # Chosen on the classes and read on unseen combinations: choice and
  # measurement apart, or the best of F always scores.
  best = found.argmax(axis=1, keepdims=True)

  def shuffle(key: Key[Array, ""]) -> Float[Array, "N"]:
    order = jax.random.permutation(key, activity.shape[0])
    return correlations(pooled, activity[order]).max(axis=1)

  # One after the other (`lax.map`), or all W of them would lie in memory at
  # once.
  keys = jax.random.split(key, num_shuffles)
  return Scores(
      own=found.max(axis=1),
      shuffled=jax.lax.map(shuffle, keys).mean(axis=0),
      unseen=unseen.max(axis=1),
      transferred=jnp.take_along_axis(unseen, best, axis=1)[:, 0],
  )
