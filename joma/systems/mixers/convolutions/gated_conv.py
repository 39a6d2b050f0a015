"""A gated convolution in the place of attention, of a fixed reach.

  c_t   = conv_7,3(conv_5(gelu(v)))_t,   causal, a kernel a channel
  out_t = sigmoid(c_t W_g + q_t) (c_t W_f + k_t)

with widths 5 and 7, the second over every third token: 23 tokens are read, its
own included, and no product of queries and keys is made. The gated
spatio-temporal attention of SimVPv2 (https://arxiv.org/abs/2211.12509), there
over pixels, made causal; ours adds what the token's own query and key say. What
lies farther back in the text reaches a token through many layers alone: 22 more
tokens a layer. XLA only.

Paper's settings: kernels of 5, then of 7 with a dilation of 3.

Letters: B batch, T tokens, W = 22 inputs that are kept, N query heads, K key
and value heads, H head size.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from joma.systems.mixers import documents
from joma.systems.mixers.convolutions import newest_values
from joma.systems.score_rules import convolved
from joma.transformer import config as configs
from joma.transformer import hooks
from kernels_pallas import masks

_NEAR, _FAR, _STEP = 5, 7, 3
# Tokens before its own that a token reads, and what the second one reads.
_BEHIND = _STEP * (_FAR - 1)
REACH = _NEAR - 1 + _BEHIND


@dataclasses.dataclass(frozen=True)
class GatedConv:
  """A mixer."""

  name: ClassVar[str] = "gated_conv"
  paper: ClassVar[str] = "https://arxiv.org/abs/2211.12509"
  neutral: ClassVar[str] = ""
  axes: ClassVar[dict[str, tuple[str | None, ...]]] = {
      "near": (None, "tensor", None),
      "far": (None, "tensor", None),
      "gate": (None, None, "tensor", None),
      "feature": (None, None, "tensor", None),
  }

  def init_params(
      self, key: Array, config: configs.TransformerConfig, layer: int
  ) -> dict[str, Array]:
    """Returns kernels [w, N, H], and W_g and W_f [N, H, N, H]."""
    heads = (config.num_heads, config.head_dim)
    shapes = {
        "near": (_NEAR, *heads),
        "far": (_FAR, *heads),
        "gate": (*heads, *heads),
        "feature": (*heads, *heads),
    }
    sizes = {"near": _NEAR, "far": _FAR}
    inputs = heads[0] * heads[1]
    return {
        name: sizes.get(name, inputs) ** -0.5 * jax.random.normal(one, shape)
        for one, (name, shape) in zip(
            jax.random.split(key, 4), shapes.items(), strict=True
        )
    }

  def mix(
      self,
      params: hooks.Params,
      call: hooks.Call,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      mask: masks.Mask,
  ) -> Float[Array, "B T N H"]:
    """Returns the heads' outputs of texts or documents, no other masks."""
    found = documents.of_mask(self.name, call, mask, len(query))
    both = newest_values.after_zeros(value, REACH)
    return found.checked(gated(params, query, key, both, found.since()))

  @property
  def num_behind(self) -> int:
    """Tokens before its own that a token reads."""
    return REACH

  def made(
      self,
      params: hooks.Params,
      positions: Int[Array, "B T"],
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B L K H"],
  ) -> Float[Array, "B T N H"]:
    """Returns the heads' outputs, of values that begin 22 tokens earlier."""
    return gated(params, query, key, value)

  def init_cache(
      self,
      config: configs.TransformerConfig,
      layer: int,
      batch_size: int,
      capacity: int,
      dtype: jax.typing.DTypeLike,
  ) -> hooks.KVCache:
    """Returns the inputs before the first token, 0, for every capacity."""
    return newest_values.init(self, config, batch_size, dtype)


def gated(
    params: hooks.Params,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B L K H"],
    since: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
  """The equation, of values that begin 22 tokens before the queries.

  Args:
    params: Of the layer.
    query: As the layer projects them.
    key: Likewise.
    value: L = 22 + T.
    since: Tokens of its document before each; None where nothing begins.
  """
  length, num_groups = query.shape[1], query.shape[2] // key.shape[2]
  key, value = (jnp.repeat(x, num_groups, axis=2) for x in (key, value))
  before = None
  if since is not None:
    before = jnp.pad(since, ((0, 0), (_BEHIND, 0)))
  near = convolved.convolve(
      jax.nn.gelu(value), params["near"], length + _BEHIND, before
  )
  made = convolved.convolve(near, params["far"], length, since, _STEP)
  product = lambda name: jnp.einsum(
      "BTNH,NHMJ->BTMJ", made, params[name].astype(made.dtype)
  )
  return jax.nn.sigmoid(product("gate") + query) * (product("feature") + key)
