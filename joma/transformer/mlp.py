"""The MLP of a Transformer block, plain or gated (arXiv 2002.05202).

What its matrices and those of attention are, `projection` says for both.
"""

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from joma.transformer import config as configs
from joma.transformer.layers import monarch
from joma.transformer.layers import products
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
      module = projection(
          config,
          (width,),
          name,
          use_bias=config.use_mlp_bias,
          dtype=self.dtype,
          part="mlp",
          **options,
      )
      return module(x) if product is None else product(module, x)

    hidden_pre = up = dense(x, config.hidden_dim, "up")
    if config.use_gated_mlp:
      hidden_pre = dense(x, config.hidden_dim, "gate")
    hidden = self._activate(hidden_pre, up)
    self.sow("intermediates", "hidden_pre", hidden_pre)
    self.sow("intermediates", "hidden", hidden)
    hidden = nn.Dropout(config.hidden_dropout)(
        hidden, deterministic=not is_training
    )
    return dense(hidden, config.embed_dim, "down", into_residual=True)

  def _activate(
      self, hidden_pre: Float[Array, "B T F"], up: Float[Array, "B T F"]
  ) -> Float[Array, "B T F"]:
    """What W_down reads; its backward pass keeps the two products alone.

    The activation and its slope are computed anew there: reading them back
    would take longer, and they are as large.
    """
    activation = activations.ACTIVATIONS[self.config.activation]
    if not self.config.use_gated_mlp:
      return activation(hidden_pre)
    return jax.checkpoint(lambda gate, up: activation(gate) * up)(
        hidden_pre, up
    )


def projection(
    config: configs.TransformerConfig,
    features: tuple[int, ...],
    name: str,
    *,
    use_bias: bool,
    dtype: jax.typing.DTypeLike,
    part: Literal["attn", "mlp"] = "attn",
    num_axes: int = 1,
    into_residual: bool = False,
) -> Any:
  """The module of a matrix of a layer, as `config.projection` has it.

  Args:
    config: The model's.
    features: Sizes of the output's axes.
    name: Of the module.
    use_bias: Whether it has one.
    dtype: Of the product.
    part: Where it is.
    num_axes: Last axes that it reads.
    into_residual: Whether what comes out is added to the residual stream.
  """
  sizes = config.monarch
  if sizes is not None and sizes.is_of(part):
    return monarch.Monarch(
        features,
        sizes,
        num_axes,
        use_bias,
        dtype,
        scale=_variance(config, into_residual),
        name=name,
    )
  options: dict[str, Any] = dict(
      use_bias=use_bias,
      dtype=dtype,
      kernel_init=kernel_init(config, into_residual=into_residual),
      name=name,
      dot_general=products.dot_general,
  )
  if part == "mlp":
    return nn.Dense(features[0], **options)
  axis = tuple(range(-num_axes, 0))
  return nn.DenseGeneral(features, axis=axis, **options)


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
  scale = _variance(config, into_residual)
  return nn.initializers.variance_scaling(scale, "fan_in", "truncated_normal")


def _variance(config: configs.TransformerConfig, into_residual: bool) -> float:
  shrink = into_residual and config.residual_scale
  return 1 / (2 * config.num_layers) if shrink else 1.0
