"""The cache of `moh_blocks`: everything, and the gates of the block that grows.

Letters: B batch, T new tokens, N query heads, K key and value heads, H head
size.
"""

import dataclasses
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from joma.systems import kept_whole
from joma.systems.routers import head_gates
from joma.transformer import config as configs
from joma.transformer import full_cache
from joma.transformer import hooks


@runtime_checkable
class Routing(Protocol):
  """A system of this kind; see `moh_blocks.MohBlocks`."""

  name: ClassVar[str]

  @property
  def active(self) -> int:
    """Heads of the routed ones that a block has."""
    ...

  @property
  def block(self) -> int:
    """Queries of a block."""
    ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutedCache(kept_whole.KeptWhole[Routing]):
  """A `hooks.KVCache` of one layer.

  Attributes:
    gates: Of the block that is not full yet, float32 [B, N].
  """

  gates: PyTree

  def takes_pieces(self) -> bool:
    """Always: a piece finds the gates of the block that it goes on with."""
    return True

  def attend(
      self,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      positions: Int[Array, "B T"],
      rotate: hooks.Rotate,
      options: hooks.AttentionOptions,
  ) -> tuple[Float[Array, "B T N H"], "RoutedCache"]:
    """Attends with all heads, then by the gates of each token's block."""
    call = options.call
    assert call is not None  # A layer gives it to the caches of its systems.
    out, kept = self.kept.attend(query, key, value, positions, rotate, options)
    params = call.params[self.system.name]
    own = head_gates.gates_of(params, call.x, self.system.active)
    # Where the block's first token stands in this call; before it: -1.
    ago = positions % self.system.block
    first = jnp.maximum(jnp.arange(query.shape[1])[None] - ago, -1) + 1
    every = jnp.concatenate([self.gates[:, None], own], axis=1)
    gates = jnp.take_along_axis(every, first[..., None], axis=1)
    num = (positions >= 0).sum(axis=1)
    after = jnp.concatenate([self.gates[:, None], gates], axis=1)
    after = jnp.take_along_axis(after, num[:, None, None], axis=1)[:, 0]
    out = gates[..., None].astype(out.dtype) * out
    return out, dataclasses.replace(self, kept=kept, gates=after)


def init(
    system: Routing,
    config: configs.TransformerConfig,
    layer: int,
    batch_size: int,
    capacity: int,
    dtype: jax.typing.DTypeLike,
) -> RoutedCache:
  """Returns an empty cache of one layer; gates are 0."""
  kept = full_cache.of_rotated(
      system.name, config, layer, batch_size, capacity, dtype
  )
  return RoutedCache(system, kept, jnp.zeros((batch_size, config.num_heads)))
