"""Kimi Delta Attention: a state that forgets each key channel at its own rate.

  S_t = diag(e^g) S_{t-1};  S_t += beta k (v - S_t^T k)^T;  o = scale S_t^T q
  g    = -A softplus(x W_1 W_2 + b) a key channel,   beta = sigmoid(x W_beta)

of unit queries and keys, with a short convolution before and a normed output
times sigmoid(x W_3 W_4) (https://arxiv.org/abs/2510.26692). Where the channels
of a head are alike it is the rule of `gdn`.

Paper's settings: three such layers to one of attention, 48B parameters of which
3B are active.

Letters: B batch, T tokens, D width, N query heads, K key and value heads, H
head size.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from joma.systems.mixers import delta_layer
from joma.transformer import config as configs
from joma.transformer import hooks


@dataclasses.dataclass(frozen=True)
class Kda(delta_layer.DeltaLayer):
  """A mixer."""

  name: ClassVar[str] = "kda"
  paper: ClassVar[str] = "https://arxiv.org/abs/2510.26692"
  neutral: ClassVar[str] = ""
  axes: ClassVar[dict[str, tuple[str | None, ...]]] = {
      **{part: (None, "tensor", None) for part in ("query", "key", "value")},
      "beta": ("fsdp", "tensor"),
      "decay_in": ("fsdp", None),
      "decay_out": (None, "tensor", None),
      "decay_log": ("tensor",),
      "decay_bias": ("tensor", None),
      "gate_in": ("fsdp", None),
      "gate_out": (None, "tensor", None),
      "scale": (None,),
  }

  def init_params(
      self, key: Array, config: configs.TransformerConfig, layer: int
  ) -> dict[str, Array]:
    """Returns `delta_layer`'s, W_1 and W_3 [D, H], W_2 and W_4 [H, N, H]."""
    keys = jax.random.split(key, 6)
    heads, size = config.num_heads, config.head_dim
    normal = lambda key, *shape: shape[0] ** -0.5 * jax.random.normal(
        key, shape
    )
    return {
        **delta_layer.draw_shared(keys[0], config, self.width),
        **delta_layer.draw_decay(keys[1], heads, (heads, size), self.start),
        "decay_in": normal(keys[2], config.embed_dim, size),
        "decay_out": normal(keys[3], size, heads, size),
        "gate_in": normal(keys[4], config.embed_dim, size),
        "gate_out": normal(keys[5], size, heads, size),
    }

  def rates(
      self, params: hooks.Params, x: Float[Array, "B T D"]
  ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Returns g and beta, float32."""
    wide = x.astype(jnp.float32)
    size = jnp.exp(params["decay_log"])[None, None, :, None]
    bias = params["decay_bias"][None, None]
    found = _low_rank(wide, params["decay_in"], params["decay_out"])
    beta = jnp.einsum("BTD,DN->BTN", wide, params["beta"])
    return -size * jax.nn.softplus(found + bias), jax.nn.sigmoid(beta)

  def opening(
      self, params: hooks.Params, x: Float[Array, "B T D"]
  ) -> Float[Array, "B T N H"]:
    """sigmoid(x W_3 W_4)."""
    kernels = (params[name].astype(x.dtype) for name in ("gate_in", "gate_out"))
    return jax.nn.sigmoid(_low_rank(x, *kernels).astype(jnp.float32))


def _low_rank(
    x: Float[Array, "B T D"],
    first: Float[Array, "D R"],
    second: Float[Array, "R N H"],
) -> Float[Array, "B T N H"]:
  inner = jnp.einsum("BTD,DR->BTR", x, first)
  return jnp.einsum("BTR,RNH->BTNH", inner, second)
