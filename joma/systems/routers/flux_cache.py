"""The cache of Flux: everything, and the route that the first prompt chose.

Letters: B batch, T new tokens, C slots, N query heads, K key and value heads, H
head size.
"""

import dataclasses
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from joma.transformer import config as configs
from joma.transformer import full_cache
from joma.transformer import hooks
from joma.transformer import one_by_one
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
class FluxCache:
  """A `hooks.KVCache` of one layer.

  Attributes:
    kept: `full_cache.FullCache`.
    share: 1 for each sequence whose prompt chose everything, else 0, [B].
    system: Static.
  """

  kept: full_cache.FullCache
  share: PyTree
  system: Routing = dataclasses.field(metadata={"static": True})

  @property
  def honours(self) -> tuple[str, ...]:
    """Its system."""
    return (self.system.name,)

  def num_positions(self) -> int:
    """Those of what it keeps."""
    return self.kept.num_positions()

  def kept_positions(self) -> None:
    """None: nothing leaves."""

  def attend(
      self,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      positions: Int[Array, "B T"],
      rotate: hooks.Rotate,
      options: hooks.AttentionOptions,
  ) -> tuple[Float[Array, "B T N H"], "FluxCache"]:
    """The first prompt chooses; what follows goes its way, one by one."""
    arguments = (query, key, value, positions, rotate, options)
    if query.shape[1] == 1:
      return self._step(*arguments)
    return one_by_one.unless_new(
        (positions[:, 0] <= 0).all(),
        lambda: self._prompt(*arguments),
        FluxCache.attend,
        self,
        *arguments,
    )

  def _prompt(
      self,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      positions: Int[Array, "B T"],
      rotate: hooks.Rotate,
      options: hooks.AttentionOptions,
  ) -> tuple[Float[Array, "B T N H"], "FluxCache"]:
    call = options.call
    assert call is not None  # A layer gives it to the caches of its systems.
    params = call.params[self.system.name]
    share = self.system.full_share(params, query, positions)
    query, key = rotate(query, positions), rotate(key, positions)
    kept = self.kept.write(key, value, positions)
    out = self.system.by_route(share, query, key, value, options)
    return out, dataclasses.replace(self, kept=kept, share=share)

  def _step(
      self,
      query: Float[Array, "B 1 N H"],
      key: Float[Array, "B 1 K H"],
      value: Float[Array, "B 1 K H"],
      positions: Int[Array, "B 1"],
      rotate: hooks.Rotate,
      options: hooks.AttentionOptions,
  ) -> tuple[Float[Array, "B 1 N H"], "FluxCache"]:
    query, key = rotate(query, positions), rotate(key, positions)
    kept = self.kept.write(key, value, positions)
    place = jnp.arange(kept.key.shape[2])[None]
    is_near = place > positions - self.system.window
    is_read = is_near | (place < self.system.sinks)
    seen = (place <= positions) & (is_read | (self.share[:, None] > 0.5))
    out, _ = one_query.attend(
        query, kept.key, kept.value, seen[:, None], options
    )
    return out, dataclasses.replace(self, kept=kept)


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
  return FluxCache(kept, jnp.ones((batch_size,)), system)
