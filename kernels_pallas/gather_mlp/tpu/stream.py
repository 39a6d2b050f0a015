"""Walks the chosen slabs of matrices in HBM, each a copy ahead of its use.

The trip count is the plan's: entries that do not count are neither copied nor
visited. Where two cores work as one, each takes half of the visits.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Int

from kernels_pallas.gather_mlp import parts
from kernels_pallas.hardware import tpu_layout
from kernels_pallas.hardware import types as hw_types


class Visit(NamedTuple):
  """One slab of each matrix.

  Attributes:
    number: Of the visit, among those of all cores.
    entry: Of the plan.
    slab: Which rows of the matrices, in units of slabs.
    slot: Of the two buffers.
  """

  number: hw_types.Index
  entry: hw_types.Index
  slab: hw_types.Index
  slot: hw_types.Index


class Stream(NamedTuple):
  """Refs of a kernel that streams slabs.

  Attributes:
    table: int32 [1 + U] in SMEM, see `table_of`.
    parts: Slabs of a block.
    num_cores: Cores that share the visits; the first axis of the grid.
    matrices: Refs in HBM; a slab is `rows` rows, or an index if rows is None.
    rows: Rows of a slab.
    buffers: VMEM, two slabs for each matrix.
    semaphores: [matrices, 2].
  """

  table: hw_types.Ref
  parts: int
  num_cores: int
  matrices: Sequence[Any]
  rows: int | None
  buffers: Sequence[Any]
  semaphores: hw_types.Barrier

  def bounds(self) -> tuple[jax.Array, jax.Array]:
    """The visits of this core, from the first to before the last."""
    count = self.table[0] * self.parts
    # Visits, not blocks, are shared out: two cores may split one block.
    share = pl.cdiv(count, self.num_cores)
    low = pl.program_id(0) * share
    return low, jnp.minimum(low + share, count)

  def walk(self, see: Callable[[Visit, list[Any]], None]) -> None:
    """Calls `see` with each slab of this core, as arrays."""
    low, high = self.bounds()
    pl.when(low < high)(lambda: self._start(low))

    def step(i: jax.Array, _: None) -> None:
      pl.when(i + 1 < high)(lambda: self._start(i + 1))
      visit = self.visit(i)
      for copy in self._copies(visit):
        copy.wait()
      see(visit, [buffer[visit.slot] for buffer in self.buffers])

    jax.lax.fori_loop(low, high, step, None)

  def place(self, matrix: hw_types.Ref, visit: Visit) -> hw_types.Ref:
    """The slab of a visit in HBM."""
    if self.rows is None:
      return matrix.at[visit.slab]
    first = tpu_layout.aligned(visit.slab * self.rows, self.rows)
    return matrix.at[pl.ds(first, self.rows)]

  def visit(self, i: hw_types.Index) -> Visit:
    """The visit of this number."""
    entry, part = (
        (i, 0) if self.parts == 1 else (i // self.parts, i % self.parts)
    )
    return Visit(i, entry, self.table[1 + entry] * self.parts + part, i & 1)

  def _start(self, i: hw_types.Index) -> None:
    for copy in self._copies(self.visit(i)):
      copy.start()

  def _copies(self, visit: Visit) -> list[Any]:
    return [
        pltpu.make_async_copy(
            self.place(matrix, visit),
            buffer.at[visit.slot],
            self.semaphores.at[k, visit.slot],
        )
        for k, (matrix, buffer) in enumerate(
            zip(self.matrices, self.buffers, strict=True)
        )
    ]


def table_of(plan: parts.Plan) -> Int[Array, "_"]:
  """How many blocks count, and which: one copy to SMEM."""
  return jnp.concatenate([plan.num[None], plan.blocks])


def scratch(matrices: Sequence[Any], rows: int) -> list[Any]:
  """Buffers and semaphores of a stream, as its refs need them."""
  return [
      *(pltpu.VMEM((2, rows, m.shape[-1]), m.dtype) for m in matrices),
      pltpu.SemaphoreType.DMA((len(matrices), 2)),
  ]
