"""The cache of native sparse attention: everything, and one key a block.

Letters: B batch, T new tokens, S positions, N query heads, K key and value
heads, G = N / K, C blocks, U keys of a block, W blocks that are read, H head
size.
"""

import dataclasses
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from joma.systems import kept_whole
from joma.systems.selectors.branches import choice
from joma.transformer import config as configs
from joma.transformer import full_cache
from joma.transformer import hooks
from joma.transformer.weighing import one_query


@runtime_checkable
class Branching(Protocol):
  """A system of this kind; see `nsa.Nsa`."""

  name: ClassVar[str]

  @property
  def k(self) -> int:
    """Blocks that a query reads."""
    ...

  @property
  def block(self) -> int:
    """Keys of a block."""
    ...

  @property
  def window(self) -> int:
    """Newest keys that a query reads."""
    ...

  def of_text(
      self,
      params: hooks.Params,
      call: hooks.Call,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
  ) -> Float[Array, "B T N H"]:
    """Attends to whole texts."""
    ...

  def compressed(
      self, params: hooks.Params, of: str, blocks: Float[Array, "B C U K H"]
  ) -> Float[Array, "B C K H"]:
    """Returns one key, or value, for each block."""
    ...

  def mixed(
      self,
      params: hooks.Params,
      call: hooks.Call,
      outs: tuple[Array, Array, Array],
  ) -> Float[Array, "B T N H"]:
    """Sums what the branches gave."""
    ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NsaCache(kept_whole.KeptWhole[Branching]):
  """A `hooks.KVCache` of one layer, of whole blocks.

  Attributes:
    blocks: Keys and values of blocks, "key" and "value", [B, C, K, H] each;
      those of blocks that are not complete are not read.
  """

  blocks: PyTree

  def read(
      self, new: kept_whole.New
  ) -> tuple[Float[Array, "B T N H"], "NsaCache"]:
    """Blocks that are complete are compressed, then the branches read."""
    params = new.call.params[self.system.name]
    if not new.is_step:
      text = (new.query, new.key, new.value)
      out = self.system.of_text(params, new.call, *text)
      return out, self._compress_all(params)
    at = new.positions[:, 0]
    cache = self._compress_one(params, at)
    outs = cache._read(new.query, at, new.options)
    return self.system.mixed(params, new.call, outs), cache

  def _compress_all(self, params: hooks.Params) -> "NsaCache":
    size = self.system.block
    cut = lambda x: jnp.moveaxis(
        x.reshape(*x.shape[:2], -1, size, x.shape[3]), 1, 3
    )
    both = {"key": self.kept.key, "value": self.kept.value}
    found = {
        of: self.system.compressed(params, of, cut(x)) for of, x in both.items()
    }
    return self._with(found)

  def _compress_one(
      self, params: hooks.Params, position: Int[Array, "B"]
  ) -> "NsaCache":
    """The block of each sequence's newest token, anew; -1 changes nothing."""
    size, found = self.system.block, {}
    number = position // size
    start = jnp.maximum(number, 0)[:, None] * size
    for of, kept in (("key", self.kept.key), ("value", self.kept.value)):
      starts = jnp.broadcast_to(start, kept.shape[:2])[..., None]
      block = kept_whole.slices(kept, starts, size)  # [B, K, 1, U, H]
      one = self.system.compressed(params, of, jnp.moveaxis(block, 1, 3))
      at = jnp.where(number < 0, self.blocks[of].shape[1], number)
      rows = jnp.arange(len(at))
      one = one[:, 0].astype(self.blocks[of].dtype)
      found[of] = self.blocks[of].at[rows, at].set(one, mode="drop")
    return self._with(found)

  def _with(self, blocks: dict[str, Array]) -> "NsaCache":
    blocks = {of: x.astype(self.blocks[of].dtype) for of, x in blocks.items()}
    return dataclasses.replace(self, blocks=blocks)

  def _read(
      self,
      query: Float[Array, "B 1 N H"],
      position: Int[Array, "B"],
      options: hooks.AttentionOptions,
  ) -> tuple[Array, Array, Array]:
    """What the three branches give to one query a sequence."""
    size, (batch, heads, capacity, _) = self.system.block, self.kept.key.shape
    keys, values = (self.blocks[of].swapaxes(1, 2) for of in ("key", "value"))
    place = jnp.arange(keys.shape[2])[None, None]
    complete = place < ((position + 1) // size)[:, None, None]
    # A query that sees no complete block gets nothing, not NaN.
    is_any = complete.any(axis=-1, keepdims=True)
    out, _ = one_query.attend(query, keys, values, complete | ~is_any, options)
    out = jnp.where(is_any[..., None], out, 0)
    grouped = query.reshape(batch, 1, heads, -1, query.shape[-1])
    own = (position // size)[:, None]
    found, is_valid = choice.choose(
        grouped.astype(jnp.float32),
        self.blocks["key"].astype(jnp.float32),
        own,
        self.system.k,
        options.scale,
    )
    starts = found[:, 0] * size
    key, value, seen = self._slices(starts, size, is_valid[:, 0], position)
    selected, _ = one_query.attend(query, key, value, seen, options)
    width = min(self.system.window, capacity)
    first = jnp.clip(position + 1 - width, 0, capacity - width)
    first = jnp.broadcast_to(first[:, None, None], (batch, heads, 1))
    oldest = position - self.system.window
    always = jnp.ones((batch, heads, 1), bool)
    key, value, seen = self._slices(first, width, always, position, oldest)
    near, _ = one_query.attend(query, key, value, seen, options)
    return out, selected, near

  def _slices(
      self,
      starts: Int[Array, "B K W"],
      size: int,
      is_valid: Bool[Array, "B K W"],
      position: Int[Array, "B"],
      oldest: Int[Array, "B"] | None = None,
  ) -> tuple[Array, Array, Array]:
    """Keys and values from each start on, and which of them are seen."""
    key, value = (
        kept_whole.slices(x, starts, size).reshape(*x.shape[:2], -1, x.shape[3])
        for x in (self.kept.key, self.kept.value)
    )
    place = starts[..., None] + jnp.arange(size)[None, None, None]
    seen = is_valid[..., None] & (place <= position[:, None, None, None])
    if oldest is not None:
      seen &= place > oldest[:, None, None, None]
    return key, value, seen.reshape(*seen.shape[:2], -1)


def init(
    system: Branching,
    config: configs.TransformerConfig,
    layer: int,
    batch_size: int,
    capacity: int,
    dtype: jax.typing.DTypeLike,
) -> NsaCache:
  """Returns an empty cache of one layer, of whole blocks."""
  kept = full_cache.of_rotated(
      system.name, config, layer, batch_size, capacity, dtype
  )
  num_blocks = capacity // system.block
  shape = (batch_size, num_blocks, config.num_kv_heads, config.head_dim)
  blocks = {of: jnp.zeros(shape, dtype) for of in ("key", "value")}
  return NsaCache(system, kept, blocks)
