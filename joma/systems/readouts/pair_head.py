"""The score of a pair of texts from their two vectors, each made alone.

A cross-encoder reads both texts at once, and every pair anew. A pair head reads
vectors that are made once a text, u and v, so that a candidate costs the same
whatever its length, and is taught the cross-encoder's scores (Distilled
Sentence Embedding, DSE: https://arxiv.org/abs/1908.05161):

  features   an MLP of u, v, u v and |u - v|, vectors of length 1 being made as
             long as sqrt(D), so that an MLP hears them
  dot        a learned factor times u . v, and an offset: symmetric in the two,
             whatever is taught

Letters: D width, F hidden size; * axes of pairs.
"""

from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float


class PairHead(nn.Module):
  """Two vectors to a score.

  Attributes:
    kind: Which of the two heads.
    hidden_dim: F of the MLP.
  """

  kind: Literal["features", "dot"] = "features"
  hidden_dim: int = 64

  @nn.compact
  def __call__(
      self, one: Float[Array, "*b D"], two: Float[Array, "*b D"]
  ) -> Float[Array, "*b"]:
    """Returns scores, whose order matters but for `dot`."""
    if self.kind == "dot":
      factor = self.param("factor", nn.initializers.ones, ())
      offset = self.param("offset", nn.initializers.zeros, ())
      return factor * (one * two).sum(axis=-1) + offset
    one, two = (x * x.shape[-1] ** 0.5 for x in (one, two))
    parts = [one, two, one * two, jnp.abs(one - two)]
    features = jnp.concatenate(parts, axis=-1)
    hidden = nn.relu(nn.Dense(self.hidden_dim, name="up")(features))
    return nn.Dense(1, name="down")(hidden)[..., 0]


def distil_loss(
    scores: Float[Array, "*b"], teacher: Float[Array, "*b"]
) -> Float[Array, ""]:
  """Mean squared difference of a student's scores and its teacher's."""
  return jnp.square(scores - teacher).mean()
