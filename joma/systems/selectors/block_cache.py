"""A full KV cache in blocks, of which a selector chooses those that are read.

Time falls, memory does not. Any selector that can choose for one query may use
it.

Letters: B batch, T new tokens, N query heads, K key and value heads, G = N / K,
S positions, C blocks, W blocks that are read, H head size.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from joma.systems import block_choice
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockCache(kept_whole.KeptWhole[block_choice.Selecting]):
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
    if isinstance(self.system, block_choice.Summarizing):
      summary = self.system.summarize(
          self.summary, new.call, new.key, new.positions
      )
      cache = dataclasses.replace(self, summary=summary)
    if new.is_step:
      return cache._read(new), cache
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

  def _read(self, new: kept_whole.New) -> Float[Array, "B 1 N H"]:
    key, value = self.kept.key, self.kept.value
    batch, num_kv_heads, capacity, head_dim = key.shape
    size, position = self.system.block, new.positions[:, 0]
    grouped = new.query.reshape(batch, num_kv_heads, -1, head_dim)
    kept = key if self.summary is None else self.summary
    chosen = self.system.choose_by(
        grouped.astype(key.dtype), kept, position, new.call
    )
    if chosen is None:
      place = jnp.arange(capacity)[None, None, None]
      is_valid = jnp.ones((1, 1, 1), bool)
    else:
      blocks, is_valid = chosen
      place = blocks[..., None] * size + jnp.arange(size)[None, None, None]
      # Blocks, whose rows lie together, not a gather by key.
      key, value = (
          kept_whole.blocks(x, blocks, size).reshape(
              batch, num_kv_heads, -1, head_dim
          )
          for x in (key, value)
      )
    is_seen = is_valid[..., None] & (place <= position[:, None, None, None])
    if new.options.window is not None:
      oldest = position - new.options.window
      is_seen &= place > oldest[:, None, None, None]
    is_seen = is_seen.reshape(*is_seen.shape[:2], -1)
    return one_query.attend(new.query, key, value, is_seen, new.options)[0]


def init(
    system: block_choice.Selecting,
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
  num_blocks = -(-capacity // system.block)
  # In whole tiles of eight rows: others libtpu may copy in every step.
  size = -(-num_blocks * system.block // 8) * 8
  shape = (batch_size, config.num_kv_heads, size, config.head_dim)
  empty = lambda: jnp.zeros(shape, dtype)
  summary = None
  if isinstance(system, block_choice.Summarizing):
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
    assert isinstance(self, block_choice.Selecting)  # Its class is a selector.
    return init(self, config, batch_size, capacity, dtype)
