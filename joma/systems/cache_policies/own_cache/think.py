"""All tokens stay; keys lose the channels that queries ask for least.

Letters: B batch, T new tokens, N query heads, K key and value heads, G = N / K,
C positions, M blocks of R tokens, H head size, J channels that stay.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from joma.inference.cache import cache_options
from joma.inference.cache import policy as policy_lib
from joma.inference.cache import slot_arrays
from joma.inference.cache import storage
from joma.inference.cost import cache_plan
from joma.systems.cache_policies.own_cache import blocks
from joma.transformer import config as configs
from joma.transformer import full_cache
from joma.transformer import hooks
from joma.transformer import one_by_one
from joma.transformer.weighing import one_query
from scansnap_jax.experiment import errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThinK(policy_lib.Policy):
  """Keys keep the channels of the greatest share in logits (2407.21018).

  A channel d of a key head is worth

    (mean of query_d^2 over its query heads and a prompt's last `window` ones)
    x (mean of key_d^2 over the prompt)

  and each sequence and head keeps its best ones; the others count as 0. The
  text is cut into blocks of `num_exact` tokens; keys of the last block, which
  is not full yet, keep all channels, and values always do. A prompt attends to
  its own tokens whole. Where the first block is filled step by step, its own
  queries and keys are asked. A budget is the tokens that keep all channels.

  Paper's settings: the last 32 queries.

  Attributes:
    kept: Share of channels that stay, in (0, 1]; one at least.
    num_exact: R.
    window: Last queries of a prompt that are asked.
  """

  label: ClassVar[str] = "ThinK"
  reads_part: ClassVar[bool] = True
  ranks_heads_alone: ClassVar[bool] = False
  num_recent: int | None = 0
  kept: float = 0.5
  num_exact: int = 128
  window: int = 32

  def __post_init__(self):
    super().__post_init__()
    if not 0 < self.kept <= 1:
      raise errors.UserError(f"kept={self.kept} must be in (0, 1].")
    for name in ("num_exact", "window"):
      if getattr(self, name) < 1:
        raise errors.UserError(
            f"{name}={getattr(self, name)} must be at least 1."
        )

  def fitted(self, slots: int, named: frozenset[str]) -> policy_lib.Policy:
    """So many tokens keep all channels."""
    if "num_exact" in named:
      return self
    return dataclasses.replace(self, num_exact=max(slots, 1))

  def plan(
      self, capacities: tuple[int, ...], name: str
  ) -> cache_plan.CachePlan:
    """All stays, keys of full blocks in part."""
    del capacities
    coding = cache_plan.FewerChannels(self.num_exact, self.kept)
    return dataclasses.replace(cache_plan.full(), name=name, coding=coding)

  def init_cache(
      self,
      config: configs.TransformerConfig,
      layer: int,
      batch_size: int,
      capacity: int,
      dtype: jax.typing.DTypeLike,
      options: cache_options.CacheOptions,
  ) -> "ThinKCache":
    """Returns a `ThinKCache` of `capacity` positions."""
    blocks.check_made("think", config, layer, dtype, options)
    shape = (batch_size, config.num_kv_heads, capacity, config.head_dim)
    return _empty(self, shape, dtype)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _empty(
    policy: ThinK, shape: tuple[int, int, int, int], dtype: jax.typing.DTypeLike
) -> "ThinKCache":
  batch, heads, capacity, head_dim = shape
  size = policy.num_exact
  few = cache_plan.num_channels(head_dim, policy.kept)
  return ThinKCache(
      key=jnp.zeros((batch, heads, capacity // size, size, few), dtype),
      value=jnp.zeros(shape, dtype),
      recent_key=jnp.zeros((batch, heads, size, head_dim), dtype),
      channels=jnp.zeros((batch, heads, few), jnp.int32),
      squares=jnp.zeros((batch, heads, head_dim)),
      policy=policy,
  )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ThinKCache:
  """A `hooks.KVCache`.

  Attributes:
    key: Of full blocks, the channels that stay [B, K, M, R, J].
    value: [B, K, C, H].
    recent_key: [B, K, R, H], of the last block: position p at p modulo R.
    channels: Those that stay, int32 [B, K, J], rising.
    squares: Sums of queries' squares float32 [B, K, H]: those of a prompt's
      last ones, and of the first block's steps.
    policy: Static.
  """

  key: storage.Leaf
  value: storage.Leaf
  recent_key: storage.Leaf
  channels: storage.Leaf
  squares: storage.Leaf
  policy: ThinK = dataclasses.field(metadata={"static": True})
  honours: ClassVar[tuple[str, ...]] = ("sinks", "keys")

  @property
  def capacity(self) -> int:
    """C."""
    return self.value.shape[2]

  def num_positions(self) -> int:
    """C."""
    return self.capacity

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
  ) -> tuple[Float[Array, "B T N H"], "ThinKCache"]:
    """First prompts attend to their own tokens, what follows to all."""
    cls, new = ThinKCache, (query, key, value, positions, rotate, options)
    return one_by_one.but_first(cls._attend, cls.attend, self, *new)

  def _attend(
      self,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      positions: Int[Array, "B T"],
      rotate: hooks.Rotate,
      options: hooks.AttentionOptions,
  ) -> tuple[Float[Array, "B T N H"], "ThinKCache"]:
    dtype = self.value.dtype
    query = rotate(query, positions)
    key = rotate(key, positions).swapaxes(1, 2).astype(dtype)
    value = value.swapaxes(1, 2).astype(dtype)
    if query.shape[1] == 1:
      return self._step(query, key, value, positions, options)
    room = max(self.capacity, query.shape[1])
    whole_key, whole_value = (slot_arrays.resize(x, room) for x in (key, value))
    out = full_cache.attend_many(
        query, whole_key, whole_value, positions, options
    ).out
    is_token = (positions >= 0)[:, None, :, None]
    whole_value = slot_arrays.resize(
        jnp.where(is_token, value, 0), self.capacity
    )
    cache = dataclasses.replace(self, value=whole_value)
    return out, cache._after(query, jnp.where(is_token, key, 0), positions)

  def _after(
      self,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B K T H"],
      positions: Int[Array, "B T"],
  ) -> "ThinKCache":
    """Keeps the keys of a prompt, 0 at padding."""
    size, num_blocks = self.policy.num_exact, self.key.shape[2]
    lengths = (positions >= 0).sum(axis=1)
    is_last = positions >= (lengths - self.policy.window)[:, None]
    is_last = is_last & (positions >= 0)
    squares = self._squares(jnp.where(is_last[..., None, None], query, 0))
    channels = _best(squares, key, self.channels.shape[-1])
    # Short of a block nothing is chosen yet: its steps are asked as well.
    is_long = (lengths >= size)[:, None, None]
    room = max(num_blocks * size, key.shape[2])
    full = blocks.cut(slot_arrays.resize(key, room), num_blocks, size)
    return dataclasses.replace(
        self,
        key=jnp.take_along_axis(full, channels[:, :, None, None], axis=-1),
        recent_key=blocks.last(key, lengths, size),
        channels=jnp.where(is_long, channels, 0),
        squares=squares,
    )

  def _squares(self, query: Float[Array, "B T N H"]) -> Float[Array, "B K H"]:
    """Sums over queries and the heads of a group."""
    batch, length, _, head_dim = query.shape
    heads = self.value.shape[1]
    grouped = query.reshape(batch, length, heads, -1, head_dim)
    return jnp.square(grouped.astype(jnp.float32)).sum(axis=(1, 3))

  def _step(
      self,
      query: Float[Array, "B 1 N H"],
      key: Float[Array, "B K 1 H"],
      value: Float[Array, "B K 1 H"],
      positions: Int[Array, "B 1"],
      options: hooks.AttentionOptions,
  ) -> tuple[Float[Array, "B 1 N H"], "ThinKCache"]:
    size, position = self.policy.num_exact, positions[:, 0]
    slot = jnp.where(position >= 0, position % size, size)
    is_first = (position >= 0) & (position < size)
    asked = jnp.where(is_first[:, None, None], self._squares(query), 0.0)
    place = jnp.where(position >= 0, position, self.capacity)
    cache = dataclasses.replace(
        self,
        value=blocks.put(self.value, value[:, :, 0], place),
        recent_key=blocks.put(self.recent_key, key[:, :, 0], slot),
        squares=self.squares + asked,
    )
    keys = blocks.joined(
        cache._whole_keys(), cache.recent_key, positions, self.capacity
    )
    seen = blocks.is_seen(positions, self.capacity, options)
    out, _ = one_query.attend(query, keys, cache.value, seen, options)
    is_full = (position >= 0) & (slot == size - 1)
    block = jnp.where(is_full, position // size, self.key.shape[2])
    cache = jax.lax.cond(
        is_full.any(), lambda: cache._with_block(block), lambda: cache
    )
    return out, cache

  def _whole_keys(self) -> Float[Array, "B K S H"]:
    """Keys of full blocks, 0 in the channels that have left."""
    batch, heads, num_blocks, size, few = self.key.shape
    rows = self.key.reshape(batch, heads, num_blocks * size, few)
    head_dim = self.recent_key.shape[-1]
    found = jnp.zeros((*rows.shape[:3], head_dim), rows.dtype)
    index = jnp.broadcast_to(self.channels[:, :, None], rows.shape)
    return jnp.put_along_axis(found, index, rows, axis=-1, inplace=False)

  def _with_block(self, block: Int[Array, "B"]) -> "ThinKCache":
    """Cuts the last block of each sequence whose number is one of M."""
    few = self.channels.shape[-1]
    chosen = _best(self.squares, self.recent_key, few)
    is_first = (block == 0)[:, None, None]
    channels = jnp.where(is_first, chosen, self.channels)
    rows = jnp.take_along_axis(self.recent_key, channels[:, :, None], axis=-1)
    key = blocks.put(self.key, rows, block)
    return dataclasses.replace(self, key=key, channels=channels)


def _best(
    squares: Float[Array, "B K H"], key: Float[Array, "B K S H"], few: int
) -> Int[Array, "B K J"]:
  """The channels of the greatest product, rising; of equal ones the first."""
  worth = squares * jnp.square(key.astype(jnp.float32)).sum(axis=2)
  return jnp.sort(jax.lax.top_k(worth, few)[1], axis=-1)
