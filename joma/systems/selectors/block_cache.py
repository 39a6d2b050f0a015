"""A full KV cache in blocks, of which a selector chooses those that are read.

Time falls, memory does not. Any selector that can choose for one query may use
it.

Letters: B batch, T new tokens, N query heads, K key and value heads, G = N / K,
S positions, C blocks, W blocks that are read, H head size.
"""

import dataclasses
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from joma.transformer import attention
from joma.transformer import config as configs
from joma.transformer import full_cache
from joma.transformer import hooks
from joma.transformer import one_by_one
from joma.transformer import one_query
from joma.transformer.weighing import merged
from kernels_pallas import masks
from kernels_pallas import selection
from scansnap_jax.experiment import errors


@runtime_checkable
class Chooser(Protocol):
  """A selector that can choose for one query a sequence."""

  name: ClassVar[str]

  @property
  def block(self) -> int:
    """Keys of a block."""
    ...

  def select(
      self,
      params: hooks.Params,
      call: hooks.Call,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B S K H"],
      mask: masks.Mask,
  ) -> selection.Selection:
    """As `hooks.Select`, of whole prompts."""
    ...

  def choose(
      self,
      query: Float[Array, "B K G H"],
      key: Float[Array, "B K S H"],
      position: Int[Array, "B"],
  ) -> tuple[Int[Array, "B K W"], Bool[Array, "B K W"]]:
    """Returns different blocks up to the position's own, and which count."""
    ...


@runtime_checkable
class ByMeans(Chooser, Protocol):
  """A chooser that looks at the mean key of each block alone."""

  def choose_by_means(
      self,
      query: Float[Array, "B K G H"],
      means: Float[Array, "B K C H"],
      position: Int[Array, "B"],
  ) -> tuple[Int[Array, "B K W"], Bool[Array, "B K W"]]:
    """As `choose`; means of blocks behind the position are arbitrary."""
    ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockCache:
  """A `hooks.KVCache`.

  Attributes:
    kept: `full_cache.FullCache` of whole blocks.
    sums: Of each block's keys [B, K, C, H], for a system that looks at means;
      else None. A step adds one key and reads none.
    system: The selector, static.
  """

  kept: full_cache.FullCache
  sums: Float[Array, "B K C H"] | None
  system: Chooser = dataclasses.field(metadata={"static": True})

  @property
  def honours(self) -> tuple[str, ...]:
    """Its selector, sinks and learned keys."""
    return (self.system.name, "sinks", "keys")

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
  ) -> tuple[Float[Array, "B T N H"], "BlockCache"]:
    """One token: the chosen blocks. More: a prompt.

    A first prompt selects as a whole text does, those that follow as their
    tokens one by one.
    """
    arguments = (query, key, value, positions, rotate, options)
    if query.shape[1] == 1:
      return self._attend(*arguments)
    return one_by_one.unless_new(
        (positions[:, 0] <= 0).all(),
        lambda: self._attend(*arguments),
        BlockCache.attend,
        self,
        *arguments,
    )

  def _attend(
      self,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      positions: Int[Array, "B T"],
      rotate: hooks.Rotate,
      options: hooks.AttentionOptions,
  ) -> tuple[Float[Array, "B T N H"], "BlockCache"]:
    query, key = rotate(query, positions), rotate(key, positions)
    kept = self.kept.write(key, value, positions)
    cache = dataclasses.replace(
        self, kept=kept, sums=self._add_to_sums(key, positions)
    )
    if query.shape[1] == 1:
      return cache._read(query, positions, options), cache
    call = options.call
    assert call is not None  # A layer gives it to the caches of its systems.
    length = query.shape[1]
    mask = masks.causal(length)
    where = self.system.select(
        call.params[self.system.name],
        call,
        query,
        key,
        attention.with_window(mask, length, options.window),
    )
    return merged.attend(query, key, value, where, options).out, cache

  def _read(
      self,
      query: Float[Array, "B 1 N H"],
      positions: Int[Array, "B 1"],
      options: hooks.AttentionOptions,
  ) -> Float[Array, "B 1 N H"]:
    batch, num_kv_heads, _, head_dim = self.kept.key.shape
    size, position = self.system.block, positions[:, 0]
    grouped = query.reshape(batch, num_kv_heads, -1, head_dim)
    key = self.kept.key
    blocks, is_valid = self._choose(grouped.astype(key.dtype), position)
    place = blocks[..., None] * size + jnp.arange(size)[None, None, None]
    is_seen = is_valid[..., None] & (place <= position[:, None, None, None])
    if options.window is not None:
      oldest = position - options.window
      is_seen &= place > oldest[:, None, None, None]
    # One slice a block, whose rows lie together, instead of a gather by key.
    flat = lambda x: x.reshape(batch, num_kv_heads, -1)
    gather = lambda x: slices(x, blocks * size, size).reshape(
        batch, num_kv_heads, -1, head_dim
    )
    out, _ = one_query.attend(
        query, gather(key), gather(self.kept.value), flat(is_seen), options
    )
    return out

  def _choose(
      self, query: Float[Array, "B K G H"], position: Int[Array, "B"]
  ) -> tuple[Int[Array, "B K W"], Bool[Array, "B K W"]]:
    if self.sums is None:
      return self.system.choose(query, self.kept.key, position)
    assert isinstance(self.system, ByMeans)  # `init` made the sums for it.
    size = self.system.block
    first = jnp.arange(self.sums.shape[2])[None] * size
    count = jnp.clip(position[:, None] + 1 - first, 1, size)
    means = self.sums / count[:, None, :, None]
    return self.system.choose_by_means(query, means, position)

  def _add_to_sums(
      self, key: Float[Array, "B T K H"], positions: Int[Array, "B T"]
  ) -> Float[Array, "B K C H"] | None:
    if self.sums is None:
      return None
    # Padding's block, -1, would be the last one.
    num_blocks = self.sums.shape[2]
    block = jnp.where(positions < 0, num_blocks, positions // self.system.block)
    add = lambda sums, block, key: sums.at[:, block].add(
        key.swapaxes(0, 1).astype(sums.dtype), mode="drop"
    )
    return jax.vmap(add)(self.sums, block, key)


def slices(
    kept: Float[Array, "B K S H"], starts: Int[Array, "B K W"], size: int
) -> Float[Array, "B K W _ H"]:
  """Reads `size` rows from each start on, and nothing else of what is kept."""
  one = lambda rows, start: jax.lax.dynamic_slice_in_dim(rows, start, size)
  of_head = jax.vmap(one, in_axes=(None, 0))
  return jax.vmap(jax.vmap(of_head))(kept, starts)


def init(
    system: Chooser,
    config: configs.TransformerConfig,
    batch_size: int,
    capacity: int,
    dtype: jax.typing.DTypeLike,
) -> BlockCache:
  """Returns an empty cache of one layer, for `capacity` positions or more.

  Raises:
    UserError: The model's rotary frequencies change with the text, and keys are
      kept rotated.
  """
  kinds = [config.rope_of(layer) for layer in range(config.num_layers)]
  if config.positions == "rotary" and any(k.changes_with_length for k in kinds):
    raise errors.UserError(
        f"{system.name} keeps rotated keys, which"
        f" rope_type={kinds[0].rope_type} turns anew as the text grows: read it"
        " at once, or without this selector."
    )
  size = -(-capacity // system.block) * system.block
  shape = (batch_size, config.num_kv_heads, size, config.head_dim)
  empty = lambda: jnp.zeros(shape, dtype)
  sums = None
  if isinstance(system, ByMeans):
    num_blocks = size // system.block
    sums = jnp.zeros((*shape[:2], num_blocks, shape[3]), jnp.float32)
  return BlockCache(full_cache.FullCache(empty(), empty()), sums, system)
