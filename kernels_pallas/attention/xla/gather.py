"""Reads the tiles of keys of a strip, and adds to them.

Letters as in `attention`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels_pallas import masks
from kernels_pallas.attention.xla import layout as xla_layout
from kernels_pallas.attention.xla import lists as xla_lists
from kernels_pallas.attention.xla import schedule
from kernels_pallas.attention.xla import together
from kernels_pallas.hardware import types as hw_types


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strip:
  """Where the pieces of a strip are; its integers are traced.

  Attributes:
    index: Its place among all strips.
    unit: Its head among U.
    head: Its head among B U.
    kv_head: The head among B K that it reads.
    tiles: The tiles that it reads, int32 [W].
    reads_all: Whether they are all of the head's, in their order.
    allowed: bool [T, S] of its queries and the keys it reads; None is all.
    layout: Sizes.
  """

  index: hw_types.Index
  unit: hw_types.Index
  head: hw_types.Index
  kv_head: hw_types.Index
  tiles: jax.Array
  reads_all: bool
  allowed: Bool[Array, "T S"] | None
  layout: xla_layout.Layout

  def gather(self, x: Float[Array, "tiles size"]) -> jax.Array:
    """The keys or values that it reads, [S, H] of [B K C, block_kv H]."""
    count, first = self.layout.num_tiles, self.kv_head * self.layout.num_tiles
    if self.reads_all:
      x = jax.lax.dynamic_slice_in_dim(x, first, count)
    else:
      x = x.at[first + self.tiles].get(mode="promise_in_bounds")
    return x.reshape(x.shape[0] * self.layout.block_kv, -1)

  def add_to_keys(
      self, x: Float[Array, "tiles size"], update: Float[Array, "H S"]
  ) -> jax.Array:
    """Adds numbers per key to [B K C, H block_kv]."""
    return self._add(x, update, self.kv_head)

  def add_to_columns(
      self, x: Float[Array, "tiles size"], update: Float[Array, "G S"]
  ) -> jax.Array:
    """Adds numbers per query head and key to [B U C, G block_kv]."""
    return self._add(x, update, self.head)

  def _add(
      self, x: jax.Array, update: jax.Array, head: hw_types.Index
  ) -> jax.Array:
    first = head * self.layout.num_tiles
    # Numbers of a tile are put next to each other, as the sums have a row a
    # tile.
    tiles = update.reshape(update.shape[0], -1, self.layout.block_kv)
    update = tiles.swapaxes(0, 1).reshape(-1, x.shape[1])
    if not self.reads_all:
      return x.at[first + self.tiles].add(update, mode="promise_in_bounds")
    old = jax.lax.dynamic_slice_in_dim(x, first, self.layout.num_tiles)
    return jax.lax.dynamic_update_slice_in_dim(x, old + update, first, 0)


def find(
    index: jax.Array,
    loop: schedule.Loop,
    lists: xla_lists.Lists,
    layout: xla_layout.Layout,
) -> Strip:
  """Finds the pieces of strip `index`, which is one of the loop's."""
  head, row = index // layout.num_rows, index % layout.num_rows
  batch, unit = head // layout.num_units, head % layout.num_units

  def pick(x: masks.AnyArray) -> jax.Array:
    b, n = batch if x.shape[0] > 1 else 0, unit if x.shape[1] > 1 else 0
    return jnp.asarray(x)[b, n, row]

  # Then keys are a slice, not a gather, and no list is read.
  reads_all = lists.is_complete and loop.width == layout.num_tiles
  if reads_all:
    tiles = jnp.arange(layout.num_tiles, dtype=jnp.int32)
    is_valid = jnp.ones(layout.num_tiles, bool)
  else:
    listed, num_valid = (pick(x) for x in (lists.table, lists.num_valid))
    is_valid = jnp.arange(loop.width) < num_valid
    tiles = jnp.where(is_valid, listed[: loop.width], 0)
  allowed = None
  if loop.is_masked:
    allowed = xla_lists.allowed(
        lists.mask, batch, row, tiles, is_valid, layout.block_kv
    )
  if lists.own is not None:
    assert allowed is not None  # No tile is one that all of them read.
    block_q = layout.block_q // lists.own.shape[-2]
    own = pick(lists.own)
    allowed &= together.allowed(own, tiles, block_q, layout.block_kv)
  return Strip(
      index=index,
      unit=unit,
      head=head,
      kv_head=head * layout.num_kv_heads // layout.num_units,
      tiles=tiles,
      reads_all=reads_all,
      allowed=allowed,
      layout=layout,
  )
