"""The state of linear attention whose memory of a key fades, as a cache.

  state_t = decay_n state_{t-1} + k_t v_t^T,   out_t = scale query_t state_t

Any mixer of this form may keep it: it says what its vectors and decays are, and
what it makes of the outputs. The state has one size, whatever the text.

Letters: B batch, T tokens, N query heads, K key and value heads, H head size.
"""

import dataclasses
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from joma.systems import of_system
from joma.transformer import config as configs
from joma.transformer import hooks
from kernels_pallas.linear_attention import api


@runtime_checkable
class Fading(Protocol):
  """A mixer of this form."""

  name: ClassVar[str]

  def features(
      self,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
  ) -> tuple[Array, Array, Array]:
    """Returns what takes the place of the three."""
    ...

  def decay(
      self, config: configs.TransformerConfig, layer: int
  ) -> Float[Array, "N"]:
    """Returns what a token leaves of each head's state, in (0, 1]."""
    ...

  def finish(
      self, params: hooks.Params, out: Float[Array, "B T N H"]
  ) -> Float[Array, "B T N H"]:
    """Returns the heads' outputs, each token's by itself."""
    ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FadingState(of_system.InPieces[Fading]):
  """A KVCache of one layer.

  Attributes:
    state: Float32 [B, N, H, H].
  """

  state: PyTree

  def attend(
      self,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      positions: Int[Array, "B T"],
      rotate: hooks.Rotate,
      options: hooks.AttentionOptions,
  ) -> tuple[Float[Array, "B T N H"], "FadingState"]:
    """One token: a step. More: texts padded at their ends, in one sweep."""
    call = options.call
    assert call is not None  # A layer gives it to the caches of its systems.
    decay = self.system.decay(call.config, call.layer)
    vectors = self.system.features(query, key, value)
    sweep = self._step if query.shape[1] == 1 else self._sweep
    out, state = sweep(*vectors, positions >= 0, decay, options)
    out = self.system.finish(call.params[self.system.name], out)
    return out, dataclasses.replace(self, state=state)

  def _step(
      self,
      query: Float[Array, "B 1 N H"],
      key: Float[Array, "B 1 K H"],
      value: Float[Array, "B 1 K H"],
      is_token: Bool[Array, "B 1"],
      decay: Float[Array, "N"],
      options: hooks.AttentionOptions,
  ) -> tuple[Float[Array, "B 1 N H"], Float[Array, "B N H H"]]:
    query, key, value = query[:, 0], key[:, 0], value[:, 0]
    out, state = api.step(
        self.state, query, key, value, decay, scale=options.scale
    )
    # Padding neither adds nor fades.
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
    """Texts padded at their ends: padding neither adds nor fades."""
    result = api.linear_attention(
        query,
        key,
        value,
        decay=decay,
        scale=options.scale,
        initial_state=self.state,
        lengths=is_token.sum(axis=1),
        return_state=True,
        implementation=options.implementation,
    )
    assert result.state is not None  # Asked for.
    return result.out, result.state


def init(
    system: Fading, config: configs.TransformerConfig, batch_size: int
) -> FadingState:
  """Returns the empty state of one layer."""
  shape = (batch_size, config.num_heads, config.head_dim, config.head_dim)
  return FadingState(system, jnp.zeros(shape))
