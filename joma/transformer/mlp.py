"""The MLP of a Transformer block, plain or gated (arXiv 2002.05202)."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from joma.transformer import config as configs
from kernels_pallas import activations

# A projection and what it reads, to what takes the place of its product.
Product = Callable[[nn.Module, Array], Array]


class Mlp(nn.Module):
  """act(x W_up) W_down, or (act(x W_gate) * (x W_up)) W_down when gated.

  Sows `hidden_pre`, the argument of the activation, and `hidden`, what W_down
  reads, both [B, T, F].

  Attributes:
    config: The model's.
    dtype: Of the products.
  """

  config: configs.TransformerConfig
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(
      self,
      x: Float[Array, "B T D"],
      is_training: bool = False,
      product: Product | None = None,
  ) -> Float[Array, "B T D"]:
    """Applies the MLP to every position.

    Args:
      x: What it reads.
      is_training: Whether hidden activations are dropped.
      product: Takes the place of each product; None computes them.
    """
    config = self.config

    def dense(x: Array, width: int, name: str, **options: Any) -> Array:
      module = nn.Dense(
          width,
          use_bias=config.use_mlp_bias,
          dtype=self.dtype,
          name=name,
          **options,
      )
      return module(x) if product is None else product(module, x)

    hidden_pre = up = dense(x, config.hidden_dim, "up")
    if config.use_gated_mlp:
      hidden_pre = dense(x, config.hidden_dim, "gate")
    hidden = activations.ACTIVATIONS[config.activation](hidden_pre)
    hidden = hidden * up if config.use_gated_mlp else hidden
    self.sow("intermediates", "hidden_pre", hidden_pre)
    self.sow("intermediates", "hidden", hidden)
    hidden = nn.Dropout(config.hidden_dropout)(
        hidden, deterministic=not is_training
    )
    init = kernel_init(config, into_residual=True)
    return dense(hidden, config.embed_dim, "down", kernel_init=init)


def in_pieces(
    apply_mlp: Mlp, x: Float[Array, "B T D"], size: int
) -> Float[Array, "B T D"]:
  """Applies an MLP to `size` positions at a time, to need less memory.

  Args:
    apply_mlp: What has parameters already.
    x: What it reads.
    size: Above 0; the last piece is filled up.
  """
  batch, length, width = x.shape
  count = -(-length // size)
  x = jnp.pad(x, ((0, 0), (0, count * size - length), (0, 0)))
  pieces = x.reshape(batch, count, size, width).swapaxes(0, 1)
  over = nn.scan(
      lambda module, carry, piece: (carry, module(piece)),
      variable_broadcast="params",
      split_rngs={"params": False},
  )
  _, out = over(apply_mlp, None, pieces)
  return out.swapaxes(0, 1).reshape(x.shape)[:, :length]


def kernel_init(
    config: configs.TransformerConfig, *, into_residual: bool = False
) -> nn.initializers.Initializer:
  """Variance 1 / fan_in; less by 2 L into the residual where config says so."""
  shrink = into_residual and config.residual_scale
  scale = 1 / (2 * config.num_layers) if shrink else 1.0
  return nn.initializers.variance_scaling(scale, "fan_in", "truncated_normal")
