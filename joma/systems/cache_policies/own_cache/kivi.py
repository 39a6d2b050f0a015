"""All tokens stay, in four bits a number; the newest as they are.

Letters: B batch, T new tokens, N query heads, K key and value heads, C
positions, M blocks of R tokens, g numbers of a group, H head size.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from joma.inference.cache import cache_options
from joma.inference.cache import policy as policy_lib
from joma.inference.cache import slot_arrays
from joma.inference.cache import storage
from joma.inference.cost import cache_plan
from joma.systems.cache_policies.own_cache import blocks
from joma.systems.cache_policies.own_cache import coding
from joma.systems.cache_policies.own_cache import int4
from joma.systems.cache_policies.own_cache import whole_blocks
from joma.transformer import config as configs
from joma.transformer import full_cache
from joma.transformer import hooks
from joma.transformer import one_by_one
from joma.transformer.weighing import one_query
from kernels_pallas.decode.coded import codes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kivi(policy_lib.Policy):
  """Four bits a number: keys by channel, values by token (KIVI, 2402.02750).

  Keys have a scale and an offset for each channel of `group_size` tokens,
  values for each token's `group_size` channels, or all where these do not
  divide the head. The text is cut into blocks of `num_exact` tokens; those of
  the last block, which is not full yet, stand as they are. A prompt attends to
  its own tokens as they are; what it leaves is coded.

  The paper codes keys block by block and values one by one, so that always as
  many values are exact; here both wait for their block. Two-bit codes are not
  here. A budget is the tokens that stand as they are.

  With `group_size=128`, blocks of 128 and heads of 128 a step is one kernel on
  a TPU, which reads codes as they are (`whole_blocks`).

  Paper's settings: 2 bits, groups of 32, the newest 128 as they are.

  Attributes:
    num_exact: R, a multiple of `group_size`.
    group_size: g.
  """

  label: ClassVar[str] = "KIVI"
  reads_part: ClassVar[bool] = True
  ranks_heads_alone: ClassVar[bool] = False
  num_recent: int | None = 0
  num_exact: int = 128
  group_size: int = 32

  def __post_init__(self):
    super().__post_init__()
    coding.check_sizes(self.num_exact, self.group_size)

  def fitted(self, slots: int, named: frozenset[str]) -> policy_lib.Policy:
    """So many tokens stand as they are, in whole groups."""
    if "num_exact" in named:
      return self
    size = self.group_size if "group_size" in named else slots
    size = min(size, self.group_size)
    num_exact = max(slots // size, 1) * size
    return dataclasses.replace(self, num_exact=num_exact, group_size=size)

  def plan(
      self, capacities: tuple[int, ...], name: str
  ) -> cache_plan.CachePlan:
    """All stays, coded but for the last block."""
    del capacities
    coded = cache_plan.Coding(self.num_exact, self.group_size)
    return dataclasses.replace(cache_plan.full(), name=name, coding=coded)

  def init_cache(
      self,
      config: configs.TransformerConfig,
      layer: int,
      batch_size: int,
      capacity: int,
      dtype: jax.typing.DTypeLike,
      options: cache_options.CacheOptions,
  ) -> "KiviCache":
    """Returns a `KiviCache` of `capacity` positions."""
    blocks.check_made("kivi", config, layer, dtype, options)
    coding.check_heads("kivi", config)
    shape = (batch_size, config.num_kv_heads, capacity, config.head_dim)
    return _empty(self, shape, dtype)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _empty(
    policy: Kivi, shape: tuple[int, int, int, int], dtype: jax.typing.DTypeLike
) -> "KiviCache":
  batch, heads, capacity, head_dim = shape
  size = policy.num_exact
  cut = (batch, heads, capacity // size, size, head_dim)
  sizes = (size, policy.group_size, capacity, head_dim)
  if whole_blocks.fit(*sizes):
    key, value = whole_blocks.empty(cut, dtype)
  else:
    key, value = coding.empty(cut, policy.group_size, dtype)
  recent = lambda: jnp.zeros((batch, heads, size, head_dim), dtype)
  return KiviCache(
      key=key,
      value=value,
      recent_key=recent(),
      recent_value=recent(),
      policy=policy,
      capacity=capacity,
  )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KiviCache:
  """A `hooks.KVCache`.

  Attributes:
    key: Codes of the full blocks, leaves [B, K, M, ...]; where groups are whole
      blocks of the kernel's size, leaves [B, M, K, ...] as it reads them.
    value: Likewise.
    recent_key: [B, K, R, H], of the last block: position p at p modulo R.
    recent_value: Likewise.
    policy: Static.
    capacity: C, static.
  """

  key: int4.Codes | codes.Blocks
  value: int4.Codes | codes.Blocks
  recent_key: storage.Leaf
  recent_value: storage.Leaf
  policy: Kivi = dataclasses.field(metadata={"static": True})
  capacity: int = dataclasses.field(metadata={"static": True})
  honours: ClassVar[tuple[str, ...]] = ("sinks", "keys")

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
  ) -> tuple[Float[Array, "B T N H"], "KiviCache"]:
    """First prompts attend to their own tokens, what follows to all."""
    cls = KiviCache
    return one_by_one.but_first(
        cls._attend,
        cls.attend,
        self,
        query,
        key,
        value,
        positions,
        rotate,
        options,
    )

  def _attend(
      self,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      positions: Int[Array, "B T"],
      rotate: hooks.Rotate,
      options: hooks.AttentionOptions,
  ) -> tuple[Float[Array, "B T N H"], "KiviCache"]:
    dtype = self.recent_key.dtype
    query = rotate(query, positions)
    key = rotate(key, positions).swapaxes(1, 2).astype(dtype)
    value = value.swapaxes(1, 2).astype(dtype)
    if query.shape[1] == 1:
      return self._step(query, key, value, positions, options)
    room = max(self.capacity, query.shape[1])
    key, value = (slot_arrays.resize(x, room) for x in (key, value))
    out = full_cache.attend_many(query, key, value, positions, options).out
    return out, self._after(key, value, (positions >= 0).sum(axis=1))

  def _after(
      self,
      key: Float[Array, "B K S H"],
      value: Float[Array, "B K S H"],
      lengths: Int[Array, "B"],
  ) -> "KiviCache":
    """Keeps a prompt of such lengths: full blocks coded, the rest as it is."""
    size, num_blocks = self.policy.num_exact, self._num_blocks
    coded_key, coded_value = self._coded(
        blocks.cut(key, num_blocks, size), blocks.cut(value, num_blocks, size)
    )
    return dataclasses.replace(
        self,
        key=coded_key,
        value=coded_value,
        recent_key=blocks.last(key, lengths, size),
        recent_value=blocks.last(value, lengths, size),
    )

  def _coded(
      self, key: Float[Array, "B K M R H"], value: Float[Array, "B K M R H"]
  ) -> coding.Pair | whole_blocks.Pair:
    dtype = self.recent_key.dtype
    if self._is_whole:
      return whole_blocks.encode(key, value, dtype)
    return coding.encode(key, value, self.policy.group_size, dtype)

  def _step(
      self,
      query: Float[Array, "B 1 N H"],
      key: Float[Array, "B K 1 H"],
      value: Float[Array, "B K 1 H"],
      positions: Int[Array, "B 1"],
      options: hooks.AttentionOptions,
  ) -> tuple[Float[Array, "B 1 N H"], "KiviCache"]:
    size, position = self.policy.num_exact, positions[:, 0]
    slot = jnp.where(position >= 0, position % size, size)
    cache = dataclasses.replace(
        self,
        recent_key=blocks.put(self.recent_key, key[:, :, 0], slot),
        recent_value=blocks.put(self.recent_value, value[:, :, 0], slot),
    )
    out = cache._attended(query, positions, options)
    is_full = (position >= 0) & (slot == size - 1)
    block = jnp.where(is_full, position // size, self._num_blocks)
    cache = jax.lax.cond(
        is_full.any(), lambda: cache._with_block(block), lambda: cache
    )
    return out, cache

  @property
  def _is_whole(self) -> bool:
    """Whether codes stand as the op reads them."""
    return isinstance(self.key, codes.Blocks)

  @property
  def _num_blocks(self) -> int:
    """M."""
    return self.key.data.shape[1 if self._is_whole else 2]

  def _attended(
      self,
      query: Float[Array, "B 1 N H"],
      positions: Int[Array, "B 1"],
      options: hooks.AttentionOptions,
  ) -> Float[Array, "B 1 N H"]:
    """By the op on codes where it can follow the options, else decoded."""
    if self._is_whole and whole_blocks.is_plain(options):
      newest = (self.recent_key, self.recent_value)
      kept: Any = (self.key, self.value)
      return whole_blocks.attend(query, kept, newest, positions, options)
    keys, values = self._read(positions)
    seen = blocks.is_seen(positions, self.capacity, options)
    return one_query.attend(query, keys, values, seen, options)[0]

  def _read(
      self, positions: Int[Array, "B 1"]
  ) -> tuple[Float[Array, "B K C H"], Float[Array, "B K C H"]]:
    """All keys and values, those of the last block as they are."""
    head_dim = self.recent_key.shape[-1]
    key: Any = self.key
    value: Any = self.value
    if self._is_whole:
      keys, values = whole_blocks.decode(key, value)
    else:
      keys, values = coding.decode(key, value, self.policy.group_size)
    flat = lambda x: x.reshape(*x.shape[:2], -1, head_dim)
    return (
        blocks.joined(flat(keys), self.recent_key, positions, self.capacity),
        blocks.joined(
            flat(values), self.recent_value, positions, self.capacity
        ),
    )

  def _with_block(self, block: Int[Array, "B"]) -> "KiviCache":
    """Codes the last block of each sequence whose number is one of M."""
    coded: Any = self._coded(
        self.recent_key[:, :, None], self.recent_value[:, :, None]
    )
    if self._is_whole:
      kept: Any = (self.key, self.value)
      kept = whole_blocks.put(kept, coded, block)
      return dataclasses.replace(self, key=kept[0], value=kept[1])
    write: PyTree = jax.tree.map(
        lambda x, new: blocks.put(x, new[:, :, 0], block),
        (self.key, self.value),
        coded,
    )
    return dataclasses.replace(self, key=write[0], value=write[1])
