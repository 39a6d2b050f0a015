"""Gated attention: a sigmoid of the layer's input for what the heads give.

  out'_t^n = sigmoid(x_t W^n) * out_t^n,   W^n of [D, H], or [D, 1] per head

before the output projection (https://arxiv.org/abs/2505.06708). A head that has
nothing to say closes its gate and need not put its weight on a first token;
with W of 0 every gate is half open, and half of plain attention comes out.

Paper's settings: a gate a head channel, 15B with experts and 1.7B without, 3.5T
tokens.

Letters: B batch, T tokens, D width, N query heads, H head size.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from joma.transformer import config as configs
from joma.transformer import hooks
from scansnap_jax.experiment import require


@dataclasses.dataclass(frozen=True)
class GatedAttention:
  """A router.

  Attributes:
    per_head: Whether a head has one gate, not one for each of its outputs.
    start: Standard deviation of W before training, times the square root of D.
  """

  name: ClassVar[str] = "gated_attention"
  paper: ClassVar[str] = "https://arxiv.org/abs/2505.06708"
  neutral: ClassVar[str] = ""
  axes: ClassVar[dict[str, tuple[str | None, ...]]] = {
      "kernel": ("fsdp", "tensor", None)
  }

  per_head: bool = False
  start: float = 1.0

  def __post_init__(self):
    require.not_negative("gated_attention: start", self.start)

  def init_params(
      self, key: Array, config: configs.TransformerConfig, layer: int
  ) -> dict[str, Array]:
    """Returns `kernel`, W of all heads: float32 [D, N, H] or [D, N, 1]."""
    width = config.embed_dim
    shape = (width, config.num_heads, 1 if self.per_head else config.head_dim)
    return {"kernel": self.start * width**-0.5 * jax.random.normal(key, shape)}

  def gate(
      self,
      params: hooks.Params,
      call: hooks.Call,
      head_out: Float[Array, "B T N H"],
  ) -> tuple[Float[Array, "B T N H"], dict[str, Float[Array, ""]]]:
    """Returns the gated outputs, and no loss."""
    kernel = params["kernel"].astype(call.x.dtype)
    opening = jnp.einsum("BTD,DNH->BTNH", call.x, kernel)
    gates = jax.nn.sigmoid(opening.astype(jnp.float32))
    return gates.astype(head_out.dtype) * head_out, {}
