"""Quest: everything is kept, and each query reads the pages worth reading.

A page knows the least and the greatest value of each channel of its keys; what
a query could at most have with one of them bounds the page (arXiv 2406.10774).
Time falls, memory does not.

Letters: B batch, T new tokens, K key and value heads, G query heads of each,
P pages, S pages read, H head size.
"""

import dataclasses
import functools
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from joma.inference.cache import cache_options
from joma.inference.cache import policy as policy_lib
from joma.inference.cache import storage
from joma.inference.cost import cache_plan
from joma.transformer import config as configs
from joma.transformer import full_cache
from joma.transformer import hooks
from joma.transformer import one_by_one
from joma.transformer.weighing import one_query
from scansnap_jax.experiment import errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quest(policy_lib.Policy):
  """Reads the pages of the greatest bound; the newest page always.

  Paper's settings: pages of 16.

  Attributes:
    num_keys: Keys read a step, a multiple of the page's size; the query heads
      of a key head read the same pages, by the greatest of their bounds.
    page_size: Keys of a page.
  """

  label: ClassVar[str] = "Quest"
  reads_part: ClassVar[bool] = True
  num_recent: int | None = 0
  num_keys: int = 1024
  page_size: int = 16

  def __post_init__(self):
    super().__post_init__()
    if self.page_size < 1 or self.num_keys < self.page_size:
      raise errors.UserError(
          f"num_keys={self.num_keys} must be at least a page, and"
          f" page_size={self.page_size} at least 1."
      )
    if self.num_keys % self.page_size:
      raise errors.UserError(
          f"num_keys={self.num_keys} must be a multiple of"
          f" page_size={self.page_size}."
      )

  def fitted(self, slots: int, named: frozenset[str]) -> policy_lib.Policy:
    """Reads so many keys, in whole pages."""
    del named
    num_keys = max(slots // self.page_size, 1) * self.page_size
    return dataclasses.replace(self, num_keys=num_keys)

  def plan(
      self, capacities: tuple[int, ...], name: str
  ) -> cache_plan.CachePlan:
    """All stays; the best pages are read."""
    num_keys = min(self.num_keys, *capacities)
    return cache_plan.paged(num_keys, self.page_size, name)

  def init_cache(
      self,
      config: configs.TransformerConfig,
      layer: int,
      batch_size: int,
      capacity: int,
      dtype: jax.typing.DTypeLike,
      options: cache_options.CacheOptions,
  ) -> "QuestCache":
    """Returns a `QuestCache`, of `capacity` positions in all."""
    full_cache.check_rotations_stay("quest", config, layer)
    if options.keys != "rotated" or options.page_size != 1:
      raise errors.UserError(
          "quest keeps rotated keys at absolute positions, in pages of its own:"
          " leave keys, positions and page_size as they are."
      )
    if jnp.dtype(dtype) == jnp.int8:
      raise errors.UserError("quest keeps floats: dtype must not be int8.")
    heads = (batch_size, config.num_kv_heads)
    num_pages = -(-capacity // self.page_size)
    return _empty(self, (*heads, num_pages, config.head_dim), dtype)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _empty(
    policy: Quest, shape: tuple[int, int, int, int], dtype: jax.typing.DTypeLike
) -> "QuestCache":
  """Returns a cache of pages that are empty, of shape [B, K, P, H]."""
  kept = (*shape[:2], shape[2] * policy.page_size, shape[3])
  return QuestCache(
      full_cache.FullCache(jnp.zeros(kept, dtype), jnp.zeros(kept, dtype)),
      jnp.full(shape, jnp.inf, dtype),
      jnp.full(shape, -jnp.inf, dtype),
      policy,
  )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuestCache:
  """A `hooks.KVCache`.

  Attributes:
    kept: `full_cache.FullCache` of P pages.
    least: [B, K, P, H], of each channel of a page's keys; inf where empty.
    greatest: As least; -inf where empty.
    policy: Static.
  """

  kept: full_cache.FullCache
  least: storage.Leaf
  greatest: storage.Leaf
  policy: Quest = dataclasses.field(metadata={"static": True})
  honours: ClassVar[tuple[str, ...]] = ("sinks", "keys")

  @property
  def capacity(self) -> int:
    """Positions of its pages."""
    return self.kept.key.shape[2]

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
  ) -> tuple[Float[Array, "B T N H"], "QuestCache"]:
    """First prompts attend to everything, what follows to chosen pages."""
    arguments = (query, key, value, positions, rotate, options)
    num_pages = self.least.shape[2]
    reads_all = num_pages * self.policy.page_size <= self.policy.num_keys
    if reads_all:
      return self._attend(*arguments)
    cls = QuestCache
    return one_by_one.but_first(cls._attend, cls.attend, self, *arguments)

  def _attend(
      self,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      positions: Int[Array, "B T"],
      rotate: hooks.Rotate,
      options: hooks.AttentionOptions,
  ) -> tuple[Float[Array, "B T N H"], "QuestCache"]:
    """Single tokens attend to the chosen pages, more to everything."""
    whole, kept = self.kept.attend(
        query, key, value, positions, rotate, options
    )
    rotated = rotate(key, positions).swapaxes(1, 2).astype(self.least.dtype)
    cache = QuestCache(
        kept,
        self._extend(self.least, rotated, positions, "min"),
        self._extend(self.greatest, rotated, positions, "max"),
        self.policy,
    )
    num_pages = self.least.shape[2]
    if query.shape[1] > 1 or num_pages * self.policy.page_size <= (
        self.policy.num_keys
    ):
      return whole, cache
    return cache._read(rotate(query, positions), positions, options), cache

  def _extend(
      self,
      bound: Float[Array, "B K P H"],
      new: Float[Array, "B K T H"],
      positions: Int[Array, "B T"],
      how: Literal["min", "max"],
  ) -> Float[Array, "B K P H"]:
    """Joins new keys to their pages' bounds; padding falls outside."""
    batch, num_kv_heads, num_pages, _ = bound.shape
    page = positions // self.policy.page_size
    page = jnp.where(positions < 0, num_pages, page)[:, None, :]
    place = bound.at[
        jnp.arange(batch)[:, None, None],
        jnp.arange(num_kv_heads)[None, :, None],
        page,
    ]
    return getattr(place, how)(new, mode="drop")

  def _read(
      self,
      query: Float[Array, "B 1 N H"],
      positions: Int[Array, "B 1"],
      options: hooks.AttentionOptions,
  ) -> Float[Array, "B 1 N H"]:
    """Gathers the pages of the greatest bounds and attends to them."""
    size, position = self.policy.page_size, positions[:, 0]
    pages = self._choose(query, position)  # [B, K, S]
    keys = (
        pages[..., None] * size + jnp.arange(size)[None, None, None]
    ).reshape(*pages.shape[:2], -1)
    gather = lambda x: _gather_pages(x, pages, size)
    is_seen = keys <= position[:, None, None]
    if options.window is not None:
      is_seen &= keys > (position - options.window)[:, None, None]
    out, _ = one_query.attend(
        query, gather(self.kept.key), gather(self.kept.value), is_seen, options
    )
    return out

  def _choose(
      self, query: Float[Array, "B 1 N H"], position: Int[Array, "B"]
  ) -> Int[Array, "B K S"]:
    batch, num_kv_heads, num_pages, head_dim = self.least.shape
    grouped = query.reshape(batch, num_kv_heads, -1, 1, head_dim)
    grouped = grouped.astype(jnp.float32)
    is_empty = ~jnp.isfinite(self.greatest[..., 0])
    bounded = lambda x: jnp.where(is_empty[..., None], 0, x)[:, :, None]
    bound = jnp.maximum(
        grouped * bounded(self.greatest), grouped * bounded(self.least)
    ).sum(axis=-1)
    bound = jnp.where(is_empty, -jnp.inf, bound.max(axis=2))
    newest = (position // self.policy.page_size)[:, None, None]
    bound = jnp.where(
        jnp.arange(num_pages)[None, None] == newest, jnp.inf, bound
    )
    num_read = min(self.policy.num_keys // self.policy.page_size, num_pages)
    return jax.lax.top_k(bound, num_read)[1]


def _gather_pages(
    x: Float[Array, "B K C H"], pages: Int[Array, "B K S"], size: int
) -> Float[Array, "B K W H"]:
  batch, num_kv_heads, _, head_dim = x.shape
  paged = x.reshape(batch, num_kv_heads, -1, size * head_dim)
  chosen = jnp.take_along_axis(paged, pages[..., None], axis=2)
  return chosen.reshape(batch, num_kv_heads, -1, head_dim)
