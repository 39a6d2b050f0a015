"""The cache of Flux: everything, and the route that the first prompt chose.

Letters: B batch, T new tokens, C slots, N query heads, K key and value heads, H
head size.
"""

import dataclasses
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from joma.systems import kept_whole
from joma.transformer import config as configs
from joma.transformer import full_cache
from joma.transformer import hooks
from joma.transformer.weighing import one_query


@runtime_checkable
class Routing(Protocol):
  """A system of this kind; see `flux.Flux`."""

  name: ClassVar[str]

  @property
  def sinks(self) -> int:
    """First keys of the stream."""
    ...

  @property
  def window(self) -> int:
    """Its newest keys."""
    ...

  def full_share(
      self,
      params: hooks.Params,
      query: Float[Array, "B T N H"],
      positions: Int[Array, "B T"],
  ) -> Float[Array, "B"]:
    """Returns 1 for each text that reads everything, else 0."""
    ...

  def by_route(
      self,
      share: Float[Array, "B"],
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      options: hooks.AttentionOptions,
  ) -> Float[Array, "B T N H"]:
    """Attends to whole texts."""
    ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FluxCache(kept_whole.KeptWhole[Routing]):
  """A `hooks.KVCache` of one layer.

  Attributes:
    share: 1 for each sequence whose prompt chose everything, else 0, [B].
  """

  share: PyTree

  def read(
      self, new: kept_whole.New
  ) -> tuple[Float[Array, "B T N H"], "FluxCache"]:
    """The first prompt chooses; what follows goes its way."""
    if new.is_step:
      return self._read(new.query, new.positions, new.options), self
    params = new.call.params[self.system.name]
    share = self.system.full_share(params, new.raw_query, new.positions)
    text = (new.query, new.key, new.value)
    out = self.system.by_route(share, *text, new.options)
    return out, dataclasses.replace(self, share=share)

  def _read(
      self,
      query: Float[Array, "B 1 N H"],
      positions: Int[Array, "B 1"],
      options: hooks.AttentionOptions,
  ) -> Float[Array, "B 1 N H"]:
    key, value = self.kept.key, self.kept.value
    place = jnp.arange(key.shape[2])[None]
    is_near = place > positions - self.system.window
    is_read = is_near | (place < self.system.sinks)
    seen = (place <= positions) & (is_read | (self.share[:, None] > 0.5))
    return one_query.attend(query, key, value, seen[:, None], options)[0]


def init(
    system: Routing,
    config: configs.TransformerConfig,
    layer: int,
    batch_size: int,
    capacity: int,
    dtype: jax.typing.DTypeLike,
) -> FluxCache:
  """Returns an empty cache of one layer."""
  kept = full_cache.of_rotated(
      system.name, config, layer, batch_size, capacity, dtype
  )
  return FluxCache(system, kept, jnp.ones((batch_size,)))
