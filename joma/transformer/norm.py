"""LayerNorm (https://arxiv.org/abs/1607.06450) and RMSNorm (1910.07467)."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Norm(nn.Module):
  """Divides the last axis by its standard deviation or root mean square.

    layer_norm   (x - mean) / sqrt(var + eps) * (scale + offset) + bias
    rms_norm     x / sqrt(mean(x^2) + eps) * (scale + offset)

  Statistics are float32 whatever the type of x.

  Attributes:
    kind: Which of the two.
    epsilon: Added to the variance or mean square.
    scale_offset: Added to the parameter: 1 in Gemma, whose scales start at 0.
    dtype: Of the result.
  """

  kind: Literal["layer_norm", "rms_norm"]
  epsilon: float
  scale_offset: float = 0.0
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Normalizes x over D."""
    init = nn.initializers.constant(1 - self.scale_offset)
    scale = self.param("scale", init, x.shape[-1:]).astype(jnp.float32)
    y = x.astype(jnp.float32)
    if self.kind == "layer_norm":
      y = y - y.mean(axis=-1, keepdims=True)
    mean_square = (y * y).mean(axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(mean_square + self.epsilon)
    y = _along_last(scale + self.scale_offset, y) * y
    if self.kind == "layer_norm":
      bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
      y = y + _along_last(bias.astype(jnp.float32), y)
    return y.astype(self.dtype)


def _along_last(vector: Array, x: Array) -> Array:
  """Adds the leading axes, so that nothing is promoted silently."""
  return vector.reshape((1,) * (x.ndim - 1) + (-1,))
