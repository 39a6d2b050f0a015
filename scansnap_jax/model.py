"""The one-layer attention model (Scan & Snap, Section 3).

  b_t = softmax_t(z_m^T x_t)       attention of query m over its context
  c   = X^T b                      attended token distribution (attn_weights)
  f   = c / ||c||_2                the paper's LN: no mean is subtracted
  logits = Y^T f

`ReparametrizedLayer` holds Z (row = query token, column = attended token) and Y
(row = attended token, column = next token) themselves. `OriginalLayer` holds
the embedding U and the projections, of which they are products:

  Z = U W_Q W_K^T U^T / sqrt(d),   Y = U W_V^T U^T.

Both sow `attn_logits` and `attn_weights` under "intermediates".

Letters as in `scansnap_jax`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from scansnap_jax import config as config_lib
from scansnap_jax import dynamics


def reparametrize(params: dict[str, Array]) -> dict[str, Array]:
  """Maps (U, W_Q, W_K, W_V) to (Y, Z); leaves (Y, Z) as they are."""
  if "Y" in params:
    return {"Y": params["Y"], "Z": params["Z"]}
  embedding = params["U"]
  width = embedding.shape[-1]
  query = embedding @ params["W_Q"]
  key = embedding @ params["W_K"]
  return {
      "Y": jnp.einsum("ld,ed,me->lm", embedding, params["W_V"], embedding),
      "Z": jnp.einsum("md,ld->ml", query, key) / width**0.5,
  }


class ReparametrizedLayer(nn.Module):
  """The layer that the paper analyses, with Y and Z as parameters.

  Attributes:
    num_tokens: M.
    config: Initial values, normalization, residual, self-attention.
  """

  num_tokens: int
  config: config_lib.ModelConfig = config_lib.ModelConfig()

  @nn.compact
  def __call__(
      self, counts: Float[Array, "B M"], query: Int[Array, "B"]
  ) -> Float[Array, "B M"]:
    """Returns the next-token logits of contexts given by token counts."""
    shape = (self.num_tokens, self.num_tokens)
    init = _initializer(self.config)
    decoder = self.param("Y", init, shape)
    attn_logits = self.param("Z", init, shape)[query]
    return _decode(self, attn_logits, counts, query) @ decoder


class OriginalLayer(nn.Module):
  """The layer before reparametrization: U [M, D], W_Q, W_K, W_V [D, D].

  Attributes:
    num_tokens: M.
    config: As for `ReparametrizedLayer`; `embed_dim` is D.
  """

  num_tokens: int
  config: config_lib.ModelConfig = config_lib.ModelConfig(zero_init=False)

  @nn.compact
  def __call__(
      self, counts: Float[Array, "B M"], query: Int[Array, "B"]
  ) -> Float[Array, "B M"]:
    """Returns the next-token logits of contexts given by token counts."""
    width = self.config.embed_dim
    init = _initializer(self.config)
    embedding = self.param(
        "U", nn.initializers.normal(width**-0.5), (self.num_tokens, width)
    )
    query_proj, key_proj, value_proj = (
        self.param(name, init, (width, width)) for name in ("W_Q", "W_K", "W_V")
    )
    # Z = U W_Q W_K^T U^T / sqrt(d), a row for each query of the batch.
    keys = embedding @ key_proj
    attn_logits = (embedding[query] @ query_proj) @ keys.T / width**0.5
    # Y = U W_V^T U^T, applied from the left: through the width, not M x M.
    attended = _decode(self, attn_logits, counts, query) @ embedding
    return attended @ value_proj.T @ embedding.T


def make_layer(config: config_lib.ModelConfig, num_tokens: int) -> nn.Module:
  """Returns the layer of `config.parametrization`."""
  if config.parametrization == "original":
    return OriginalLayer(num_tokens, config)
  return ReparametrizedLayer(num_tokens, config)


def _initializer(config: config_lib.ModelConfig):
  """Zeros, or U(-1/sqrt(fan_in), 1/sqrt(fan_in)): 3 * variance = 1 / fan_in."""
  if config.zero_init:
    return nn.initializers.zeros
  return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _decode(
    layer: ReparametrizedLayer | OriginalLayer,
    attn_logits: Float[Array, "B M"],
    counts: Float[Array, "B M"],
    query: Int[Array, "B"],
) -> Float[Array, "B M"]:
  """Attends, normalizes, and adds the residual: what the decoder reads."""
  config = layer.config
  residual = jax.nn.one_hot(query, layer.num_tokens, dtype=counts.dtype)
  # Self-attention: the query is one more token of its own context.
  if config.query_in_context:
    counts = counts + residual
  attn_weights = dynamics.attended(counts, attn_logits)
  layer.sow("intermediates", "attn_logits", attn_logits)
  layer.sow("intermediates", "attn_weights", attn_weights)
  use_l2 = config.normalization == "l2"
  features = dynamics.l2_normalize(attn_weights) if use_l2 else attn_weights
  if config.use_residual:
    # Normalized before and after the residual, so that either part has length 1
    # when they meet.
    features = features + residual
    features = dynamics.l2_normalize(features) if use_l2 else features
  return features
