"""Lightning attention: linear attention whose memory of a key fades.

  state_t = decay_n state_{t-1} + k_t v_t^T,   k = silu(key), v = silu(value)
  out_t   = scale rms_norm(silu(query_t) state_t)

with the decays of ALiBi's slopes, exp(-2^(-8 (n + 1) / N) f), that fade less in
higher layers, f = 1 - layer / (L - 1) + 1e-5: Lightning Attention-2
(https://arxiv.org/abs/2401.04658) in the block of TransNormerLLM. There is no
denominator: the norm over the heads' outputs takes its place. A query costs the
same whatever its place in the text, and so does the state.

Letters: B batch, T tokens, N query heads, K key and value heads, H head size, L
layers.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree
import numpy as np

from joma.transformer import config as configs
from joma.transformer import hooks
from joma.transformer import layer_hooks
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
  ) -> "LightningState":
    """Returns the empty state, the same for every capacity."""
    shape = (batch_size, config.num_heads, config.head_dim, config.head_dim)
    return LightningState(jnp.zeros(shape), self)

  def mix(
      self,
      params: hooks.Params,
      call: hooks.Call,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      mask: masks.Mask,
  ) -> Float[Array, "B T N H"]:
    """Returns the heads' outputs of whole texts; refuses other masks."""
    layer_hooks.check_causal(self.name, call, mask)
    attend = lambda query, key, value, mask, decay: api.linear_attention(
        query,
        key,
        value,
        decay=decay,
        scale=call.options.scale,
        implementation=call.options.implementation,
    ).out
    query, key, value = (jax.nn.silu(x) for x in (query, key, value))
    decay = decays(call.config, call.layer)
    out = sharding.per_part(attend, query, key, value, mask, decay)
    return self.normalize(out, params)

  def normalize(
      self, out: Float[Array, "B T N H"], params: hooks.Params
  ) -> Float[Array, "B T N H"]:
    """RMS norm over all heads of a token, float32 inside."""
    wide = out.astype(jnp.float32)
    size = jnp.square(wide).mean(axis=(-2, -1), keepdims=True)
    wide = wide * jax.lax.rsqrt(size + self.epsilon)
    return (wide * params["scale"][None, None]).astype(out.dtype)


def decays(config: configs.TransformerConfig, layer: int) -> Float[Array, "N"]:
  """What a step leaves of each head's state, between 0 and 1."""
  heads = np.arange(1, config.num_heads + 1)
  rest = 1 - layer / max(config.num_layers - 1, 1) + 1e-5
  return jnp.asarray(np.exp(-(2.0 ** (-8 * heads / config.num_heads)) * rest))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LightningState:
  """The state of one layer; an `attention.KVCache` of one size.

  Attributes:
    state: Float32 [B, N, H, H].
    system: Static.
  """

  state: PyTree
  system: Lightning = dataclasses.field(metadata={"static": True})
  honours: ClassVar[tuple[str, ...]] = ("lightning",)

  def attend(
      self,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      positions: Int[Array, "B T"],
      rotate: hooks.Rotate,
      options: hooks.AttentionOptions,
  ) -> tuple[Float[Array, "B T N H"], "LightningState"]:
    """One token: a step. More: texts padded at their ends, in one sweep."""
    call = options.call
    assert call is not None  # A layer gives it to the caches of its systems.
    decay = decays(call.config, call.layer)
    query, key, value = (jax.nn.silu(x) for x in (query, key, value))
    sweep = self._step if query.shape[1] == 1 else self._sweep
    out, state = sweep(query, key, value, positions >= 0, decay, options)
    out = self.system.normalize(out, call.params[self.system.name])
    return out, dataclasses.replace(self, state=state)

  def _step(
      self,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      is_token: Bool[Array, "B T"],
      decay: Float[Array, "N"],
      options: hooks.AttentionOptions,
  ) -> tuple[Float[Array, "B T N H"], Float[Array, "B N H H"]]:
    out, state = api.step(
        self.state,
        query[:, 0],
        key[:, 0],
        value[:, 0],
        decay,
        scale=options.scale,
    )
    return out[:, None], jnp.where(is_token[..., None, None], state, self.state)

  def _sweep(
      self,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      is_token: Bool[Array, "B T"],
      decay: Float[Array, "N"],
      options: hooks.AttentionOptions,
  ) -> tuple[Float[Array, "B T N H"], Float[Array, "B N H H"]]:
    """Rolls rows so that padding comes first, where nothing can fade yet.

    What was in the state is added apart: after n tokens decay^n of it is left,
    and n counts tokens, not padding.
    """
    lengths = is_token.sum(axis=1)
    padding = query.shape[1] - lengths
    roll = jax.vmap(lambda x, by: jnp.roll(x, by, axis=0))
    only = lambda x: jnp.where(is_token[..., None, None], x, 0)
    result = api.linear_attention(
        *(roll(only(x), padding) for x in (query, key, value)),
        decay=decay,
        scale=options.scale,
        return_state=True,
        implementation=options.implementation,
    )
    counts = jnp.cumsum(is_token, axis=1).astype(jnp.float32)
    left = lambda n: jnp.exp(jnp.einsum("...,N->...N", n, jnp.log(decay)))
    read = jnp.einsum("BTNH,BNHJ->BTNJ", query.astype(jnp.float32), self.state)
    before = options.scale * left(counts)[..., None] * read
    out = roll(result.out, -padding) + before.astype(result.out.dtype)
    rest = left(lengths.astype(jnp.float32))[..., None, None] * self.state
    return out, result.state + rest
