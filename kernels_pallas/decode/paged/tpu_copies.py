"""Copies between the pages of a pool in HBM and the VMEM of a TPU.

Letters as in `decode`. Nothing past `num_pages` is copied; entries of the table
are brought into the pool's range, as the kernel's own bounds are not checked.
"""

from collections.abc import Callable
import functools
import operator
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from kernels_pallas.decode import tpu_step
from kernels_pallas.decode.paged import tpu_config
from kernels_pallas.hardware import types as hw_types

_UNROLLED = 8


class Pages(NamedTuple):
  """Refs of a sequence's pages.

  Attributes:
    sizes: Of the call.
    first_row: b K.
    table: [R, M] in SMEM.
    num_pages: [R] in SMEM.
    small: score, pos and scales by name, [P, S] in HBM.
    stored: key and value [P, S, H] in HBM.
    near: As small, [K, pages, S] in VMEM.
    blocks: Of keys and of values, two of [pages, S, H] each.
    reads: A semaphore for what is small.
    arrivals: One for each of two blocks.
    writes: One for all that goes back.
  """

  sizes: tpu_config.Sizes
  first_row: hw_types.Index
  table: hw_types.Ref
  num_pages: hw_types.Ref
  small: dict[str, Any]
  stored: list[hw_types.Ref]
  near: dict[str, Any]
  blocks: list[hw_types.Ref]
  reads: hw_types.Barrier
  arrivals: hw_types.Barrier
  writes: hw_types.Barrier

  def pages_of(self, k: hw_types.Index) -> jax.Array:
    """Pages of key head k."""
    return jnp.clip(
        self.num_pages[self.first_row + k], 1, self.sizes.most_pages
    )

  def page(self, k: hw_types.Index, m: hw_types.Index) -> jax.Array:
    """Where page m of a head is in the pool."""
    page = self.table[self.first_row + k, m]
    return jnp.clip(page, 0, self.sizes.total_pages - 1)

  def num_blocks(self, k: hw_types.Index) -> jax.Array:
    """Blocks of a head."""
    return pl.cdiv(self.pages_of(k), self.sizes.block_pages)

  def num_of_block(self, k: hw_types.Index, i: hw_types.Index) -> jax.Array:
    """Pages of its block i."""
    size = self.sizes.block_pages
    return jnp.minimum(self.pages_of(k) - i * size, size)

  def start_small(self) -> None:
    """Asks for scores, positions and scales of all heads."""

    def start(k: hw_types.Index, i: hw_types.Index, j: hw_types.Index) -> None:
      m = i * self.sizes.block_pages + j
      page = self.page(k, m)
      for name, far in self.small.items():
        near = self.near[name].at[k, pl.ds(m, 1)]
        _copy(far.at[pl.ds(page, 1)], near, self.reads).start()

    self._for_blocks(
        lambda k, i: self._for_pages(
            self.num_of_block(k, i), lambda j: start(k, i, j)
        )
    )

  def await_small(self) -> None:
    """Waits for them."""
    self._await_rows(len(self.near) * self._total(), self.reads)

  def start_block(
      self, k: hw_types.Index, i: hw_types.Index, which: hw_types.Index
  ) -> None:
    """Asks for keys and values of a block."""

    def start(j: hw_types.Index) -> None:
      page = self.page(k, i * self.sizes.block_pages + j)
      for far, block in zip(self.stored, self.blocks, strict=True):
        semaphore = self.arrivals.at[which]
        _copy(far.at[page], block.at[which, j], semaphore).start()

    self._for_pages(self.num_of_block(k, i), start)

  def await_block(
      self, k: hw_types.Index, i: hw_types.Index, which: hw_types.Index
  ) -> None:
    """Waits for them; values of pages that are not there become 0."""
    num, size = self.num_of_block(k, i), self.sizes.block_pages

    @pl.when(num == size)
    def _():
      for block in self.blocks:
        tpu_step.await_bytes(block.at[which], self.arrivals.at[which])

    @pl.when(num < size)
    def _():
      @pl.loop(0, num)
      def _(j: hw_types.Index):
        for block in self.blocks:
          tpu_step.await_bytes(block.at[which, j], self.arrivals.at[which])

      # Their weights are 0, but 0 times what lies there may be NaN.
      @pl.loop(num, size)
      def _(j: hw_types.Index):
        values = self.blocks[1]
        values[which, j] = jnp.zeros(values.shape[2:], values.dtype)

  def start_scores(self, k: hw_types.Index, i: hw_types.Index) -> None:
    """Sends the scores of a block back."""

    def start(j: hw_types.Index) -> None:
      m = i * self.sizes.block_pages + j
      self.start_row("score", k, m)

    self._for_pages(self.num_of_block(k, i), start)

  def start_row(self, name: str, k: hw_types.Index, m: hw_types.Index) -> None:
    """Sends a page of what is small back."""
    near = self.near[name].at[k, pl.ds(m, 1)]
    far = self.small[name].at[pl.ds(self.page(k, m), 1)]
    _copy(near, far, self.writes).start()

  def await_writes(self, tiles: hw_types.Ref) -> None:
    """Waits for all scores, `tiles`, and the rest of a page a head."""
    num_others = self.sizes.call.num_kv_heads * (len(self.near) - 1)
    # All scores go back, of positions and scales one page a head.
    self._await_rows(self._total() + num_others, self.writes)
    tpu_step.await_bytes(tiles, self.writes)

  def _total(self) -> jax.Array:
    """Pages of all heads."""
    counts = map(self.pages_of, range(self.sizes.call.num_kv_heads))
    return functools.reduce(operator.add, counts)

  def _await_rows(self, num: jax.Array, semaphore: hw_types.Barrier) -> None:
    """Waits for so many bytes as `num` pages of what is small have."""
    rows = self.near["score"].at[0]
    wait = lambda size: lambda _: tpu_step.await_bytes(
        rows.at[pl.ds(0, size)], semaphore
    )
    pl.loop(0, num // _UNROLLED)(wait(_UNROLLED))
    pl.loop(0, num % _UNROLLED)(wait(1))

  def _for_blocks(self, body: Callable[[Any, Any], None]) -> None:
    """Calls with each key head and each of its blocks."""

    @pl.loop(0, self.sizes.call.num_kv_heads)
    def _(k: hw_types.Index):
      pl.loop(0, self.num_blocks(k))(lambda i: body(k, i))

  def _for_pages(self, num: jax.Array, body: Callable[[Any], None]) -> None:
    """Calls with 0 to num - 1, eight in a turn of a loop where it can."""
    # Copies are short: the loop around them would take as long.
    num_whole = num & -_UNROLLED

    @pl.loop(0, num_whole, step=_UNROLLED)
    def _(first: jax.Array):
      first = pl.multiple_of(first, _UNROLLED)
      for j in range(_UNROLLED):
        body(first + j)

    pl.loop(num_whole, num)(body)


def _copy(
    source: hw_types.Ref, target: hw_types.Ref, semaphore: hw_types.Barrier
) -> hw_types.Copy:
  return pltpu.make_async_copy(source, target, semaphore)
