"""One vector of unit length for a text, by four designs of pooling.

  eos       the last token's state after the last layer
  mean      the mean of the last layer's states over the tokens
  latents   learned queries that attend to the last layer's states
  layers    learned queries that attend to the last token's state after each
            layer, to which an embedding of the layer is added

The last two are one module, `LatentPooling`, over other keys: attention with
norms before it and a residual, then a gated GELU with a norm before it and a
residual, then the mean over the queries (https://arxiv.org/abs/2409.02727).
The first two have nothing to learn. Whether tokens see what comes after them
is the model's matter, not the pooling's: `Transformer` takes a mask.

Letters: B batch, M layers of a model and one, T tokens, S states that are
attended to, D width, Q learned queries, N heads, H head size, F hidden size.
"""

from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from joma.transformer import norm

# By name, those that need no training.
FIXED = ("mean", "eos")
_EPSILON = 1e-6
# Of the squared length: a text of zeros has the vector 0, and a gradient.
_TINY = 1e-12


def pool(
    design: str, resid: Float[Array, "B M T D"], lengths: Int[Array, "B"]
) -> Float[Array, "B D"]:
  """Pools by a design that has nothing to learn.

  Args:
    design: Of `FIXED`.
    resid: The residual stream before each layer and after the last, padded at
      the end.
    lengths: Tokens of each text, at least 1.

  Returns:
    Vectors of length 1, in float32.

  Raises:
    ValueError: The design is another.
  """
  if design not in FIXED:
    raise ValueError(f"design must be one of {FIXED}, got {design!r}")
  if design == "eos":
    return unit(last_tokens(resid, lengths)[:, -1])
  is_token = token_mask(resid.shape[2], lengths)
  total = jnp.einsum("BTD,BT->BD", resid[:, -1].astype(jnp.float32), is_token)
  return unit(total / lengths[:, None])


def unit(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
  """Divides vectors by their length."""
  x = x.astype(jnp.float32)
  square = jnp.square(x).sum(axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(square, _TINY))


def last_tokens(
    resid: Float[Array, "B M T D"], lengths: Int[Array, "B"]
) -> Float[Array, "B M D"]:
  """The last token's state before each layer and after the last."""
  last = (lengths - 1)[:, None, None, None]
  return jnp.take_along_axis(resid, last, axis=2)[:, :, 0]


def token_mask(num_tokens: int, lengths: Int[Array, "B"]) -> Bool[Array, "B T"]:
  """What is a token, and no padding behind a text."""
  return jnp.arange(num_tokens)[None] < lengths[:, None]


class LatentPooling(nn.Module):
  """Learned queries read states, and their mean is the vector of the text.

  Attributes:
    num_latents: Q.
    num_heads: N, a divisor of D.
    hidden_dim: F of the gated GELU.
    has_layers: Whether states are of layers, each with an embedding of its own
      (the design `layers`), and not of tokens.
  """

  num_latents: int = 16
  num_heads: int = 4
  hidden_dim: int = 64
  has_layers: bool = False

  @nn.compact
  def __call__(
      self, states: Float[Array, "B S D"], is_state: Bool[Array, "B S"]
  ) -> Float[Array, "B D"]:
    """Returns vectors of length 1; states that are none are not read."""
    width = states.shape[-1]
    draw = nn.initializers.normal(width**-0.5)
    if self.has_layers:
      states += self.param("layer_embed", draw, states.shape[1:])[None]
    latents = self.param("latents", draw, (self.num_latents, width))
    latents = jnp.broadcast_to(latents, (len(states), *latents.shape))
    make = lambda name: norm.Norm("layer_norm", _EPSILON, name=name)
    read = nn.MultiHeadDotProductAttention(self.num_heads, name="attn")
    found = read(
        make("latent_norm")(latents),
        make("state_norm")(states),
        mask=is_state[:, None, None],
    )
    # By its annotations, flax gives nothing.
    latents += cast(Array, found)
    hidden = make("mlp_norm")(latents)
    gate = nn.gelu(nn.Dense(self.hidden_dim, name="gate")(hidden))
    up = nn.Dense(self.hidden_dim, name="up")(hidden)
    latents += nn.Dense(width, name="down")(gate * up)
    return unit(latents.mean(axis=1))
