"""Lightning attention: linear attention whose memory of a key fades.

  state_t = decay_n state_{t-1} + k_t v_t^T,   k = silu(key), v = silu(value)
  out_t   = scale rms_norm(silu(query_t) state_t)

with the decays of ALiBi's slopes, exp(-2^(-8 (n + 1) / N) f), that fade less in
higher layers, f = 1 - layer / (L - 1) + 1e-5: Lightning Attention-2
(https://arxiv.org/abs/2401.04658) in the block of TransNormerLLM. There is no
denominator: the norm over the heads' outputs takes its place. A query costs the
same whatever its place in the text, and so does the state. Packed documents are
XLA only.

Paper's settings: decays by head as ALiBi's slopes, less in later layers.

Letters: B batch, T tokens, N query heads, K key and value heads, H head size, L
layers.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from joma.systems.mixers import documents
from joma.systems.mixers import fading_state
from joma.transformer import config as configs
from joma.transformer import hooks
from joma.transformer import sharding
from kernels_pallas import masks
from kernels_pallas.linear_attention import api


@dataclasses.dataclass(frozen=True)
class Lightning:
  """A mixer.

  Attributes:
    epsilon: Of the norm, beside the mean square.
  """

  name: ClassVar[str] = "lightning"
  paper: ClassVar[str] = "https://arxiv.org/abs/2401.04658"
  neutral: ClassVar[str] = ""
  axes: ClassVar[dict[str, tuple[str | None, ...]]] = {
      "scale": ("tensor", None)
  }

  epsilon: float = 1e-5

  def init_params(
      self, key: Array, config: configs.TransformerConfig, layer: int
  ) -> dict[str, Array]:
    """Returns `scale` of the norm, float32 [N, H]."""
    return {"scale": jnp.ones((config.num_heads, config.head_dim))}

  def init_cache(
      self,
      config: configs.TransformerConfig,
      layer: int,
      batch_size: int,
      capacity: int,
      dtype: jax.typing.DTypeLike,
  ) -> hooks.KVCache:
    """Returns the empty state, the same for every capacity."""
    return fading_state.init(self, config, batch_size)

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
    starts = found.starts
    decay = self.decay(call.config, call.layer)

    def attend(
        query: Array, key: Array, value: Array, _: masks.Mask, decay: Array
    ) -> Array:
      return api.linear_attention(
          query,
          key,
          value,
          decay=decay,
          scale=call.options.scale,
          segment_starts=starts,
          implementation=call.options.implementation,
      ).out

    vectors = self.features(query, key, value)
    if starts is None:
      out = sharding.per_part(attend, *vectors, mask, decay)
    else:  # XLA alone follows documents, and splits what it computes itself.
      out = attend(*vectors, mask, decay)
    return self.finish(params, found.checked(out))

  def features(
      self,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
  ) -> tuple[Array, Array, Array]:
    """What the state takes in: silu of each."""
    return jax.nn.silu(query), jax.nn.silu(key), jax.nn.silu(value)

  def decay(
      self, config: configs.TransformerConfig, layer: int
  ) -> Float[Array, "N"]:
    """What a token leaves of each head's state, between 0 and 1."""
    heads = np.arange(1, config.num_heads + 1)
    rest = 1 - layer / max(config.num_layers - 1, 1) + 1e-5
    slopes = 2.0 ** (-8 * heads / config.num_heads)
    return jnp.asarray(np.exp(-slopes * rest))

  def finish(
      self, params: hooks.Params, out: Float[Array, "B T N H"]
  ) -> Float[Array, "B T N H"]:
    """RMS norm over all heads of a token, float32 inside."""
    wide = out.astype(jnp.float32)
    size = jnp.square(wide).mean(axis=(-2, -1), keepdims=True)
    wide = wide * jax.lax.rsqrt(size + self.epsilon)
    return (wide * params["scale"][None, None]).astype(out.dtype)
