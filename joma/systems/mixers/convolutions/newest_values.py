"""The newest values of a text, as the cache of a convolution of fixed reach.

Letters: B batch, T new tokens, W values before them, N query heads, K key and
value heads, H head size.
"""

import dataclasses
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from joma.systems import of_system
from joma.systems.score_rules import convolved
from joma.transformer import config as configs
from joma.transformer import hooks


@runtime_checkable
class Convolving(Protocol):
  """A mixer of this kind; see `gated_conv.GatedConv`."""

  name: ClassVar[str]

  @property
  def num_behind(self) -> int:
    """W, tokens before its own that a token reads."""
    ...

  def made(
      self,
      params: hooks.Params,
      positions: Int[Array, "B T"],
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B L K H"],
  ) -> Float[Array, "B T N H"]:
    """Returns the heads' outputs, of values that begin W tokens earlier."""
    ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NewestValues(of_system.InPieces[Convolving]):
  """A KVCache of one layer.

  Attributes:
    values: The newest [B, W, K, H].
  """

  values: PyTree

  def attend(
      self,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      positions: Int[Array, "B T"],
      rotate: hooks.Rotate,
      options: hooks.AttentionOptions,
  ) -> tuple[Float[Array, "B T N H"], "NewestValues"]:
    """Any number of tokens after those before; padding is not kept."""
    call, system = options.call, self.system
    assert call is not None  # A layer gives it to the caches of its systems.
    both = jnp.concatenate([self.values.astype(value.dtype), value], axis=1)
    params = call.params[system.name]
    out = system.made(params, positions, query, key, both)
    lengths = (positions >= 0).sum(axis=1)
    newest = convolved.last_inputs(both, lengths, system.num_behind)
    return out, NewestValues(system, newest.astype(self.values.dtype))


def init(
    system: Convolving,
    config: configs.TransformerConfig,
    batch_size: int,
    dtype: jax.typing.DTypeLike,
) -> NewestValues:
  """Returns the values before the first token, 0, for every capacity."""
  shape = (batch_size, system.num_behind, config.num_kv_heads, config.head_dim)
  return NewestValues(system, jnp.zeros(shape, dtype))


def after_zeros(
    value: Float[Array, "B T K H"], num_behind: int
) -> Float[Array, "B L K H"]:
  """A whole text's values, those before its first token being 0."""
  return jnp.pad(value, ((0, 0), (num_behind, 0), (0, 0), (0, 0)))
