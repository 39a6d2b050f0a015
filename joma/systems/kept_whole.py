"""Caches that keep everything, of which one system says what is read.

A system's cache has `read`, and whatever else it keeps as fields. What it gets
has been rotated, and written.

Letters: B batch, T new tokens, N query heads, K key and value heads, S
positions, W slices, H head size.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from joma.systems import of_system
from joma.transformer import full_cache
from joma.transformer import hooks

Read = tuple[Float[Array, "B T N H"], "KeptWhole"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class New:
  """New tokens of one call.

  Attributes:
    query: Rotated [B, T, N, H].
    key: Rotated [B, T, K, H].
    value: Of the same tokens.
    positions: -1 is padding [B, T].
    raw_query: As query, not rotated.
    options: As in `hooks.KVCache`.
  """

  query: Float[Array, "B T N H"]
  key: Float[Array, "B T K H"]
  value: Float[Array, "B T K H"]
  positions: Int[Array, "B T"]
  raw_query: Float[Array, "B T N H"]
  options: hooks.AttentionOptions

  @property
  def is_step(self) -> bool:
    """Whether it is one token a sequence."""
    return self.query.shape[1] == 1

  @property
  def call(self) -> hooks.Call:
    """The layer's call."""
    assert self.options.call is not None  # Layers give it to such caches.
    return self.options.call


@dataclasses.dataclass(frozen=True)
class KeptWhole(of_system.PromptFirst[of_system.System]):
  """A `hooks.KVCache` of one layer.

  Attributes:
    kept: `full_cache.FullCache` of rotated keys.
  """

  kept: full_cache.FullCache

  def num_positions(self) -> int:
    """Those of what it keeps."""
    return self.kept.num_positions()

  def kept_positions(self) -> None:
    """None: nothing leaves."""

  def take(
      self,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      positions: Int[Array, "B T"],
      rotate: hooks.Rotate,
      options: hooks.AttentionOptions,
  ) -> Read:
    """Writes a first prompt, or one token a sequence, then reads."""
    turned = rotate(key, positions)
    kept = self.kept.write(turned, value, positions)
    new = New(
        query=rotate(query, positions),
        key=turned,
        value=value,
        positions=positions,
        raw_query=query,
        options=options,
    )
    return dataclasses.replace(self, kept=kept).read(new)

  def read(self, new: New) -> Read:
    """Returns what queries read, and the cache with what else it keeps."""
    raise NotImplementedError


def blocks(
    kept: Float[Array, "B K S H"], index: Int[Array, "B K W"], size: int
) -> Float[Array, "B K W _ H"]:
  """Reads blocks of `size` rows by their numbers, and nothing else.

  Blocks have an axis of their own: slices that begin anywhere in the axis of S
  make libtpu lay out all that is kept anew, in every step. So would blocks that
  are no whole tiles of 8 rows, which are read row by row.
  """
  if size > 1 and size % 8:
    return slices(kept, index * size, size)
  in_blocks = kept.reshape(*kept.shape[:2], -1, size, kept.shape[-1])
  of_head = jax.vmap(lambda rows, index: rows[index])
  return jax.vmap(of_head)(in_blocks, index)


def slices(
    kept: Float[Array, "B K S H"], starts: Int[Array, "B K W"], size: int
) -> Float[Array, "B K W _ H"]:
  """Reads `size` rows from each start on, wherever it lies, as `blocks` does.

  All of them are among what is kept.
  """
  rows = starts[..., None] + jnp.arange(size)[None, None, None]
  flat = rows.reshape(*starts.shape[:2], -1)
  found = blocks(kept, flat, 1)
  return found.reshape(*rows.shape, kept.shape[-1])
