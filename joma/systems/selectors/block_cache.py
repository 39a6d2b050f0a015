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
from jaxtyping import Array, Bool, Float, Int, PyTree

from joma.systems import kept_whole
from joma.transformer import attention
from joma.transformer import config as configs
from joma.transformer import full_cache
from joma.transformer import hooks
from joma.transformer import layer_hooks
from joma.transformer.weighing import merged
from joma.transformer.weighing import one_query
from joma.transformer.weighing import rows
from kernels_pallas import masks


@runtime_checkable
class Selecting(Protocol):
  """A selector of blocks."""

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
  ) -> hooks.Where:
    """As `hooks.Select`, of whole prompts."""
    ...


@runtime_checkable
class Chooser(Protocol):
  """A selector that can choose for one query a sequence by all keys."""

  def choose(
      self,
      query: Float[Array, "B K G H"],
      key: Float[Array, "B K S H"],
      position: Int[Array, "B"],
  ) -> tuple[Int[Array, "B K W"], Bool[Array, "B K W"]]:
    """Returns different blocks up to the position's own, and which count."""
    ...


@runtime_checkable
class ChoosingByCall(Protocol):
  """A selector that can choose by its call, and by what it keeps of keys."""

  def choose_by(
      self,
      query: Float[Array, "B K G H"],
      summary: PyTree,
      position: Int[Array, "B"],
      call: hooks.Call,
  ) -> tuple[Int[Array, "B K W"], Bool[Array, "B K W"]] | None:
    """As `Chooser.choose`; None reads everything."""
    ...


@runtime_checkable
class Summarizing(ChoosingByCall, Protocol):
  """One that keeps something of the keys."""

  def init_summary(
      self, config: configs.TransformerConfig, batch_size: int, num_blocks: int
  ) -> PyTree:
    """Returns what is kept of an empty cache, leaves [B, ...]."""
    ...

  def summarize(
      self,
      summary: PyTree,
      call: hooks.Call,
      key: Float[Array, "B T K H"],
      positions: Int[Array, "B T"],
  ) -> PyTree:
    """Adds new tokens; keys are rotated, and those at -1 are padding."""
    ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockCache(kept_whole.KeptWhole[Selecting]):
  """A `hooks.KVCache`, of whole blocks.

  Attributes:
    summary: What a `Summarizing` system chooses by; None for others. A step
      adds its token to it.
  """

  summary: PyTree

  @property
  def honours(self) -> tuple[str, ...]:
    """Its selector, with weights of its own if any; sinks and learned keys."""
    own = ("weights",) if isinstance(self.system, hooks.Weights) else ()
    return (self.system.name, "sinks", "keys", *own)

  def read(
      self, new: kept_whole.New
  ) -> tuple[Float[Array, "B T N H"], "BlockCache"]:
    """One token: the chosen blocks. A first prompt: as a whole text."""
    cache = self
    if isinstance(self.system, Summarizing):
      summary = self.system.summarize(
          self.summary, new.call, new.key, new.positions
      )
      cache = dataclasses.replace(self, summary=summary)
    if new.is_step:
      return cache._read(new.query, new.positions, new.options), cache
    return cache._of_text(new), cache

  def _of_text(self, new: kept_whole.New) -> Float[Array, "B T N H"]:
    query, key, value = new.query, new.key, new.value
    options, length = new.options, query.shape[1]
    mask = masks.causal(length)
    where = self.system.select(
        new.call.params[self.system.name],
        new.call,
        query,
        key,
        attention.with_window(mask, length, options.window),
    )
    rule = options.weights
    if rule is None or rule.is_softmax:
      return merged.attend(query, key, value, where, options).out
    layer_hooks.check_implementation(rule, options.implementation)
    places = (new.positions, new.positions)
    return rows.attend(query, key, value, where, options, places)

  def _read(
      self,
      query: Float[Array, "B 1 N H"],
      positions: Int[Array, "B 1"],
      options: hooks.AttentionOptions,
  ) -> Float[Array, "B 1 N H"]:
    key, value = self.kept.key, self.kept.value
    batch, num_kv_heads, capacity, head_dim = key.shape
    size, position = self.system.block, positions[:, 0]
    grouped = query.reshape(batch, num_kv_heads, -1, head_dim)
    chosen = self._choose(grouped.astype(key.dtype), position, options.call)
    if chosen is None:
      place = jnp.arange(capacity)[None, None, None]
      is_valid = jnp.ones((1, 1, 1), bool)
    else:
      blocks, is_valid = chosen
      place = blocks[..., None] * size + jnp.arange(size)[None, None, None]
      # One slice a block, whose rows lie together, not a gather by key.
      key, value = (
          slices(x, blocks * size, size).reshape(
              batch, num_kv_heads, -1, head_dim
          )
          for x in (key, value)
      )
    is_seen = is_valid[..., None] & (place <= position[:, None, None, None])
    if options.window is not None:
      oldest = position - options.window
      is_seen &= place > oldest[:, None, None, None]
    is_seen = is_seen.reshape(*is_seen.shape[:2], -1)
    return one_query.attend(query, key, value, is_seen, options)[0]

  def _choose(
      self,
      query: Float[Array, "B K G H"],
      position: Int[Array, "B"],
      call: hooks.Call | None,
  ) -> tuple[Int[Array, "B K W"], Bool[Array, "B K W"]] | None:
    if isinstance(self.system, ChoosingByCall):
      assert call is not None  # As above.
      return self.system.choose_by(query, self.summary, position, call)
    assert isinstance(self.system, Chooser)  # `init` takes one of the two.
    return self.system.choose(query, self.kept.key, position)


def slices(
    kept: Float[Array, "B K S H"], starts: Int[Array, "B K W"], size: int
) -> Float[Array, "B K W _ H"]:
  """Reads `size` rows from each start on, and nothing else of what is kept."""
  one = lambda rows, start: jax.lax.dynamic_slice_in_dim(rows, start, size)
  of_head = jax.vmap(one, in_axes=(None, 0))
  return jax.vmap(jax.vmap(of_head))(kept, starts)


def init(
    system: Selecting,
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
  for layer in range(config.num_layers):
    full_cache.check_rotations_stay(system.name, config, layer)
  size = -(-capacity // system.block) * system.block
  shape = (batch_size, config.num_kv_heads, size, config.head_dim)
  empty = lambda: jnp.zeros(shape, dtype)
  summary = None
  if isinstance(system, Summarizing):
    num_blocks = size // system.block
    summary = system.init_summary(config, batch_size, num_blocks)
  kept = full_cache.FullCache(empty(), empty())
  return BlockCache(system, kept, summary)


class InBlocks:
  """A selector that decodes from a `BlockCache`."""

  def init_cache(
      self,
      config: configs.TransformerConfig,
      layer: int,
      batch_size: int,
      capacity: int,
      dtype: jax.typing.DTypeLike,
  ) -> hooks.KVCache:
    """Returns an empty cache of whole blocks, and of what it chooses by."""
    assert isinstance(self, Selecting)  # Its class is a selector.
    return init(self, config, batch_size, capacity, dtype)
