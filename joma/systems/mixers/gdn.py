"""Gated DeltaNet: a state that forgets by heads and replaces what it holds.

  S_t = e^g S_{t-1};  S_t += beta k (v - S_t^T k)^T;  o = scale S_t^T q
  g    = -A softplus(x W_g + b),   beta = sigmoid(x W_beta)

of unit queries and keys, with a short convolution before and a normed output
times silu(x W_z) (https://arxiv.org/abs/2412.06464). `delta_layer` has what
this shares with `kda`. Under grouped queries a head has its own state, decay
and beta, on the key and value of its group.

Paper's settings: convolutions of 4 inputs, SiLU, unit queries and keys.

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
class Gdn(delta_layer.DeltaLayer):
  """A mixer."""

  name: ClassVar[str] = "gdn"
  paper: ClassVar[str] = "https://arxiv.org/abs/2412.06464"
  neutral: ClassVar[str] = ""
  axes: ClassVar[dict[str, tuple[str | None, ...]]] = {
      **{part: (None, "tensor", None) for part in ("query", "key", "value")},
      "beta": ("fsdp", "tensor"),
      "decay": ("fsdp", "tensor"),
      "decay_log": ("tensor",),
      "decay_bias": ("tensor",),
      "gate": ("fsdp", "tensor", None),
      "scale": (None,),
  }

  def init_params(
      self, key: Array, config: configs.TransformerConfig, layer: int
  ) -> dict[str, Array]:
    """Returns `delta_layer`'s, W_g [D, N], log A and b [N], W_z [D, N, H]."""
    keys = jax.random.split(key, 4)
    size, heads = config.embed_dim, config.num_heads
    normal = lambda key, *shape: size**-0.5 * jax.random.normal(key, shape)
    return {
        **delta_layer.draw_shared(keys[0], config, self.width),
        **delta_layer.draw_decay(keys[1], heads, (heads,), self.start),
        "decay": normal(keys[2], size, heads),
        "gate": normal(keys[3], size, heads, config.head_dim),
    }

  def rates(
      self, params: hooks.Params, x: Float[Array, "B T D"]
  ) -> tuple[Float[Array, "B T N"], Float[Array, "B T N"]]:
    """Returns g and beta, float32."""
    of_heads = lambda name: jnp.einsum(
        "BTD,DN->BTN", x.astype(jnp.float32), params[name]
    )
    size = jnp.exp(params["decay_log"])[None, None]
    bias = params["decay_bias"][None, None]
    log_decay = -size * jax.nn.softplus(of_heads("decay") + bias)
    return log_decay, jax.nn.sigmoid(of_heads("beta"))

  def opening(
      self, params: hooks.Params, x: Float[Array, "B T D"]
  ) -> Float[Array, "B T N H"]:
    """silu(x W_z)."""
    gate = params["gate"].astype(x.dtype)
    opening = jnp.einsum("BTD,DNH->BTNH", x, gate)
    return jax.nn.silu(opening.astype(jnp.float32))
