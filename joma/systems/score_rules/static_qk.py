"""Queries and keys of the token embedding, in every layer.

Values are of the layer's input as ever; what attends to what is decided by
tokens and positions before any layer has mixed them: StaticEmbQK of
Deconstructing Attention (https://arxiv.org/abs/2510.11602). In layers over the
first one it is another function than attention. The embedding is normalized by
its root mean square, without parameters.

Paper's settings: 500M parameters, 15B tokens.

Letters: B batch, T tokens, D width.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from joma.transformer import hooks


@dataclasses.dataclass(frozen=True)
class StaticQk:
  """Says what the projections read.

  Attributes:
    epsilon: Of the norm, beside the mean square.
  """

  name: ClassVar[str] = "static_qk"
  paper: ClassVar[str] = "https://arxiv.org/abs/2510.11602"
  neutral: ClassVar[str] = ""

  epsilon: float = 1e-5

  def read(
      self, params: hooks.Params, call: hooks.Call
  ) -> tuple[Array, Array, Array]:
    """Returns the embedding twice, and the layer's input."""
    embed = normalized(call.carry["resid_embed"], self.epsilon)
    return embed, embed, call.x


def normalized(x: Float[Array, "B T D"], epsilon: float) -> Array:
  """Divides by the root mean square, float32 inside."""
  wide = x.astype(jnp.float32)
  size = jnp.square(wide).mean(axis=-1, keepdims=True)
  return (wide * jax.lax.rsqrt(size + epsilon)).astype(x.dtype)
