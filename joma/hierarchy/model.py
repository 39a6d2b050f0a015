"""The Transformer of JoMA's Table 1, and what it need not compute.

embedding -> blocks of (one causal head, residual, LayerNorm, ReLU MLP,
residual, LayerNorm) -> linear layer at the last position
(https://arxiv.org/abs/2310.00535, Table 1; its code). What the paper
leaves open: the head has no biases and no output projection, and positions are
not encoded.

Two savings leave the logits and every gradient what they are:

* Padding in front. A padding token attends to the padding before it alone, all
  of it alike, so that in every layer all its copies carry one and the same
  vector. One copy is enough if its attention logit is raised by the logarithm
  of their number n, as n e^a = e^(a + ln n): `num_padding`.
* The last block. Logits need its last position alone; the others, which the
  correlation scores pool over, are left out by `last_only`.

Blocks sow `attn_logits` (before mask and ln n), `attn_weights` (a merged token
gets the sum of its copies) and `hidden` (after the ReLU) under "intermediates".

Letters as in `joma.hierarchy`.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

_EPSILON = 1e-5


class HierarchyTransformer(nn.Module):
  """Logits of the class of a sequence, read off its last position.

  Attributes:
    num_tokens: M, padding included.
    num_classes: K.
    num_layers: Blocks.
    embed_dim: D.
    hidden_dim: F, which is 4 M in Table 1.
  """

  num_tokens: int
  num_classes: int
  num_layers: int = 3
  embed_dim: int = 1024
  hidden_dim: int = 400

  @nn.compact
  def __call__(
      self,
      tokens: Int[Array, "B T"],
      num_padding: int | Int[Array, ""] = 1,
      *,
      last_only: bool = False,
  ) -> Float[Array, "B K"]:
    """Returns the logits.

    Args:
      tokens: Token ids.
      num_padding: How many copies of itself the first token of each sequence
        stands for; see `hierarchy.merge_padding`.
      last_only: Compute, and sow, the last block at the last position alone.
    """
    shape = (self.num_tokens, self.embed_dim)
    stream = self.param("embedding", nn.initializers.normal(1.0), shape)[tokens]
    for layer in range(self.num_layers):
      is_last = layer == self.num_layers - 1
      block = Block(self.hidden_dim, name=block_name(layer))
      stream = block(stream, num_padding, last_only=last_only and is_last)
    return _linear(self, "classes", stream[:, -1], self.num_classes)


def block_name(layer: int) -> str:
  """Where the variables of a block stand, and what it sows."""
  return f"block_{layer}"


class Block(nn.Module):
  """A post-LN block.

  Attributes:
    hidden_dim: F.
  """

  hidden_dim: int

  @nn.compact
  def __call__(
      self,
      stream: Float[Array, "B S D"],
      num_padding: int | Int[Array, ""],
      *,
      last_only: bool,
  ) -> Float[Array, "B T D"]:
    """Returns the new residual stream, of all positions or the last one."""
    width, length = stream.shape[2], stream.shape[1]
    w_query, w_key, w_value = (
        self.param(name, _uniform(width), (width, width))
        for name in ("W_Q", "W_K", "W_V")
    )
    ending = stream[:, -1:] if last_only else stream
    query, key, value = ending @ w_query, stream @ w_key, stream @ w_value
    attn_logits = jnp.einsum("BTD,BSD->BTS", query, key) / width**0.5
    # The last rows of the causal mask, where the last block is asked for its
    # last position alone.
    mask = jnp.tril(jnp.ones((length, length), bool))[-ending.shape[1] :]
    attn_weights = attend(attn_logits, mask, num_padding)
    attended = jnp.einsum("BTS,BSD->BTD", attn_weights, value)
    middle = _layer_norm(self, "norm_1", ending + attended)
    hidden = jax.nn.relu(_linear(self, "mlp_in", middle, self.hidden_dim))
    self.sow("intermediates", "attn_logits", attn_logits)
    self.sow("intermediates", "attn_weights", attn_weights)
    self.sow("intermediates", "hidden", hidden)
    output = _linear(self, "mlp_out", hidden, width)
    return _layer_norm(self, "norm_2", middle + output)


def attend(
    attn_logits: Float[Array, "B T S"],
    attn_mask: Bool[Array, "T S"],
    num_padding: int | Int[Array, ""] = 1,
) -> Float[Array, "B T S"]:
  """Softmax over the keys that the mask keeps, the first one n times over."""
  is_first = jnp.arange(attn_logits.shape[2]) == 0
  # n e^a = e^{a + ln n}: the merged token weighs as its n copies would.
  log_copies = jnp.log(jnp.asarray(num_padding, attn_logits.dtype))
  bias = jnp.where(is_first, log_copies, 0)
  bias = jnp.where(attn_mask, bias[None], -jnp.inf)
  return jax.nn.softmax(attn_logits + bias[None], axis=2)


def _linear(
    module: nn.Module, name: str, inputs: Float[Array, "*b I"], width: int
) -> Float[Array, "*b O"]:
  """W^T x + b; both start uniform with the bound 1 / sqrt(fan_in)."""
  start = _uniform(inputs.shape[-1])
  weights = module.param(f"{name}_w", start, (inputs.shape[-1], width))
  outputs = inputs @ weights
  bias = module.param(f"{name}_b", start, (width,))
  return outputs + jnp.broadcast_to(bias, outputs.shape)


def _uniform(fan_in: int) -> Callable[..., Array]:
  """Initial values U(-1 / sqrt(fan_in), 1 / sqrt(fan_in))."""
  bound = fan_in**-0.5

  def draw(key: Key[Array, ""], shape: tuple[int, ...]) -> Array:
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

  return draw


def _layer_norm(
    module: nn.Module, name: str, inputs: Float[Array, "B T D"]
) -> Float[Array, "B T D"]:
  width = inputs.shape[-1]
  scale = module.param(f"{name}_scale", nn.initializers.ones, (width,))
  bias = module.param(f"{name}_bias", nn.initializers.zeros, (width,))
  centered = inputs - inputs.mean(axis=2, keepdims=True)
  variance = (centered**2).mean(axis=2, keepdims=True)
  normal = centered * jax.lax.rsqrt(variance + _EPSILON)
  return normal * scale[None, None] + bias[None, None]
