"""Tiles of keys and values: resident in VMEM, or fetched one ahead from HBM.

Resident keys are read from HBM once for all rows and heads of a group. Streamed
ones are read once per visit, each tile while the one before is in use.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.hardware import tpu_layout
from kernels_pallas.hardware import types as hw_types

# In VMEM with two buffers (the next head is fetched during this one), with one,
# or in HBM.
Place = Literal["vmem", "vmem_once", "hbm"]


def block(array: jax.Array, place: Place, group: int) -> pl.BlockSpec:
  """All positions of the key head that the grid's query head reads."""
  if place == "hbm":
    return pl.BlockSpec(memory_space=pl.ANY)
  mode = {} if place == "vmem" else {"pipeline_mode": pl.Buffered(1)}
  return pl.BlockSpec(
      (1, 1, *array.shape[2:]), lambda b, n, r: (b, n // group, 0, 0), **mode
  )


def scratch(
    name: str, array: jax.Array, place: Place, size: int
) -> dict[str, hw_types.Buffer]:
  """Two buffers of a tile and their semaphores, by name; none if resident."""
  if place != "hbm":
    return {}
  shape = (2, size, array.shape[3])
  return {
      f"{name}_buffers": pltpu.VMEM(shape, array.dtype),
      f"{name}_semaphores": pltpu.SemaphoreType.DMA((2,)),
  }


def tiles(
    at: hw_types.Refs,
    name: str,
    place: Place,
    head: tuple[Any, Any],
    size: int,
) -> "Resident | Streamed":
  """What reads the tiles of an array in the order of `at.tile`.

  Args:
    at: Refs by name: the array, and what `scratch` made.
    name: Of the array [B, K, S, H].
    place: Where it is.
    head: Numbers of the batch and of the key head.
    size: Positions of a tile.
  """
  ref = getattr(at, name)
  if place != "hbm":
    return Resident(ref, at.tile, size)
  buffers = getattr(at, f"{name}_buffers")
  semaphores = getattr(at, f"{name}_semaphores")
  return Streamed(ref, at.tile, size, head, buffers, semaphores)


def _place(i: hw_types.Index, size: int) -> hw_types.Slice:
  return pl.ds(tpu_layout.aligned(i * size, size), size)


class Resident(NamedTuple):
  """Tiles of a block that is in VMEM."""

  ref: hw_types.Ref
  tile: Callable[[hw_types.Index], jax.Array]
  size: int

  def open(self, low: hw_types.Index, high: hw_types.Index) -> None:
    """Nothing has to be fetched."""

  def read(self, i: hw_types.Index, high: hw_types.Index) -> jax.Array:
    """The tile of visit i."""
    return self.ref[0, 0, _place(self.tile(i), self.size)]


class Streamed(NamedTuple):
  """Tiles that are copied from HBM into two buffers in turn."""

  ref: hw_types.Ref
  tile: Callable[[hw_types.Index], jax.Array]
  size: int
  head: tuple[Any, Any]
  buffers: hw_types.Ref
  semaphores: hw_types.Barrier

  def _copy(self, i: hw_types.Index) -> hw_types.Copy:
    place = _place(self.tile(i), self.size)
    # Two buffers in turn: one is read while the other is filled.
    slot = i & 1
    return pltpu.make_async_copy(
        self.ref.at[*self.head, place],
        self.buffers.at[slot],
        self.semaphores.at[slot],
    )

  def open(self, low: hw_types.Index, high: hw_types.Index) -> None:
    """Starts the copy of the first of visits low to high - 1."""
    pl.when(low < high)(lambda: self._copy(low).start())

  def read(self, i: hw_types.Index, high: hw_types.Index) -> jax.Array:
    """The tile of visit i, which must be called in order."""
    pl.when(i + 1 < high)(lambda: self._copy(i + 1).start())
    self._copy(i).wait()
    return self.buffers[i & 1]
