"""Some heads keep everything, the others a window.

Letters: B batch, T new tokens, K key and value heads, G query heads of each, C
slots a head on average, M = K C slots of a layer, H head size.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from joma.inference.cache import cache_options
from joma.inference.cache import kv_cache
from joma.inference.cache import policy as policy_lib
from joma.inference.cost import cache_plan
from joma.systems.cache_policies import names
from joma.systems.cache_policies.by_place import full
from joma.transformer import config as configs
from joma.transformer import hooks
from scansnap_jax.experiment import errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class DuoAttention(policy_lib.Policy):
  """Retrieval heads keep all, the others sinks and a window (2410.10819).

  Paper's settings: heads found by gates that are trained with a penalty of .05.

  Attributes:
    retrieval_heads: Of each layer, the key heads that keep everything; found
      beforehand, by a measurement of one's own.
    window_capacity: Slots of each of the other heads, sinks included.
  """

  num_sinks: int = 4
  num_recent: int | None = 0
  retrieval_heads: tuple[tuple[int, ...], ...] = ()
  window_capacity: int = 256
  ranks_heads_alone: ClassVar[bool] = False

  def init_cache(
      self,
      config: configs.TransformerConfig,
      layer: int,
      batch_size: int,
      capacity: int,
      dtype: jax.typing.DTypeLike,
      options: cache_options.CacheOptions,
  ) -> "BucketedCache":
    """Returns a `BucketedCache` of two `SlotCache`s."""
    if layer >= len(self.retrieval_heads):
      raise errors.UserError(
          f"retrieval_heads names heads of {len(self.retrieval_heads)} layers;"
          f" the model has {config.num_layers}."
      )
    retrieval = tuple(sorted(set(self.retrieval_heads[layer])))
    known = range(config.num_kv_heads)
    if not set(retrieval) <= set(known):
      raise errors.UserError(
          f"retrieval_heads={self.retrieval_heads[layer]} of layer {layer} must"
          f" be key heads from 0 to {config.num_kv_heads - 1}."
      )
    streaming = tuple(head for head in known if head not in retrieval)
    near = names.from_name(names.STREAMING, num_sinks=self.num_sinks)
    buckets = []
    for heads, kind, size in (
        (retrieval, full.Full(), capacity),
        (streaming, near, min(self.window_capacity, capacity)),
    ):
      if heads:
        shape = (batch_size, len(heads), size, config.head_dim)
        num_groups = config.num_heads // config.num_kv_heads
        cache = kv_cache.init_layer(
            kind.with_capacity(size), layer, shape, num_groups, dtype, options
        )
        buckets.append((heads, cache))
    heads, caches = zip(*buckets, strict=True)
    return BucketedCache(caches, heads)

  def costed(self, room: cache_plan.Room, name: str) -> cache_plan.CachePlan:
    """The share that is kept is that of the heads that keep everything."""
    window = int(room.settings.get("window_capacity", self.window_capacity))
    heads = cache_plan.split_heads(room.kept, window, room.length, room.model)
    return cache_plan.window(heads, name)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BucketedCache:
  """Caches of different sizes for different heads; a `hooks.KVCache`.

  Attributes:
    caches: A KVCache a bucket.
    heads: Its key heads, static; each is in one bucket.
  """

  caches: tuple[kv_cache.SlotCache, ...]
  heads: tuple[tuple[int, ...], ...] = dataclasses.field(
      metadata={"static": True}
  )

  def num_positions(self) -> int | None:
    """The least of its buckets that keep everything."""
    sizes = [cache.num_positions() for cache in self.caches]
    return min((size for size in sizes if size is not None), default=None)

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
  ) -> tuple[Float[Array, "B T N H"], "BucketedCache"]:
    """Each bucket for its heads."""
    batch, length, num_heads, head_dim = query.shape
    grouped = query.reshape(batch, length, key.shape[2], -1, head_dim)
    outs, caches = [], []
    for heads, cache in zip(self.heads, self.caches, strict=True):
      index = np.array(heads)
      mine = grouped[:, :, index].reshape(batch, length, -1, head_dim)
      out, cache = cache.attend(
          mine, key[:, :, index], value[:, :, index], positions, rotate, options
      )
      outs.append(out.reshape(batch, length, len(heads), -1, head_dim))
      caches.append(cache)
    order = np.argsort(np.concatenate([np.array(h) for h in self.heads]))
    out = jnp.concatenate(outs, axis=2)[:, :, order]
    return out.reshape(query.shape), BucketedCache(tuple(caches), self.heads)
