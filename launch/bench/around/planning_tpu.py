"""What surrounds attention to blocks that data choose, on a TPU not there.

A part of `launch.bench.kernels` for --target=tpu:CHIP --ops=planning. A table
that is known while tracing becomes constants; one that a program computes is
planned in the program: XLA's estimate of the cycles of its own operations. The
kernels' bundles are those of the same table when it is known, since a schedule
cannot follow loops whose trip counts are data. Arrays come heads first, as XLA
lets the projections of a layer write them; what it takes to bring arrays of
eight heads there from jax's own layout, and results back, is a column of its
own. Nothing is measured.
"""

from collections.abc import Sequence
import functools
import itertools

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from kernels_pallas import selection as selection_lib
from kernels_pallas.aot import chips
from kernels_pallas.aot import jobs as jobs_lib
from kernels_pallas.aot import schedule
from kernels_pallas.attention import api
from launch.bench import harness
from launch.bench.ops import compiled
from launch.bench.ops import programs

DENSITY = 0.1
# Queries and keys of a block, the same number.
BLOCKS = (128, 512)
# As many fill the sublanes of a tile.
_NUM_COPIED = 8
_UNKNOWN = 1 << 62
_COLUMNS: harness.Columns = {
    "chip": ("chip", str),
    "block": ("blocks", "{0}x{0}".format),
    "passes": ("pass", str),
    "kernels": ("kernels", "{:,}".format),
    "planning": ("planning", "{:,}".format),
    "share": ("of the kernels", "{:.1%}".format),
    "copies": ("copies of jax's layout, a head", "{:,.0f}".format),
}
_Found = tuple[compiled.Case, harness.Row, schedule.Report | None]


def from_data(
    length: int,
    block: int,
    density: float,
    num_heads: int = 1,
    is_backward: bool = False,
) -> programs.Program:
  """Attention to the blocks of a table that is an argument, heads first.

  Args:
    length: T, all causal.
    block: Queries and keys of a block.
    density: Of the table, as in `programs.random_selection`.
    num_heads: Each with blocks of its own.
    is_backward: Whether to return the gradients instead.

  Returns:
    A function of the table, [B, N, R, W] and [B, N, R], and of arrays
    [1, N, T, H], and what it takes.
  """
  known = programs.random_selection(length, num_heads, block, block, density)

  def run(table: tuple[Array, Array], *arrays: Array) -> PyTree:
    where = selection_lib.Selection(*table, known.mask, block, block)

    def attend(*arrays: Array) -> Array:
      arrays = tuple(x.swapaxes(1, 2) for x in arrays)
      result = api.attention(*arrays, where=where, implementation="pallas_tpu")
      return result.out.swapaxes(1, 2)

    return (programs.with_backward(attend) if is_backward else attend)(*arrays)

  if is_backward:
    # A layer's cotangent is a product's result, which dQ may overwrite; an
    # argument is not, and would be copied.
    run = jax.jit(run, donate_argnums=4)

  table = tuple(
      jax.ShapeDtypeStruct(x.shape, jnp.int32)
      for x in (known.block_table, known.num_valid)
  )
  shape = (1, num_heads, length, programs.HEAD_DIM)
  array = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  return run, (table, *(array,) * (4 if is_backward else 3))


def measure(
    chip: chips.Chip,
    length: int,
    blocks: Sequence[int] = BLOCKS,
    passes: Sequence[bool] = (False, True),
    num_workers: int = 2,
) -> list[harness.Row]:
  """A row a size of blocks and a pass.

  Args:
    chip: What for; a head a core.
    length: T.
    blocks: Queries and keys of a block.
    passes: Whether backward is in, of each row.
    num_workers: Compilers to run side by side.

  Raises:
    JobFailed: If one does not compile.
    ToolchainMissing: If the compiler is not installed.
  """
  cases = []
  for block, is_backward in itertools.product(blocks, passes):
    of_pass = {"length": length, "density": DENSITY, "is_backward": is_backward}
    own = of_pass | {"num_heads": chip.num_cores}
    tiles = {"block_q": block, "block_kv": block}
    case = functools.partial(
        compiled.Case,
        facts={
            "length": length,
            "block": block,
            "passes": "both" if is_backward else "forward",
        },
    )
    cases += [
        case(kernel="known", program=programs.sparse, options=own | tiles),
        case(kernel="data", program=from_data, options=own | {"block": block}),
        case(
            kernel="copied",
            program=programs.sparse,
            options=of_pass | tiles | {"num_heads": _NUM_COPIED},
        ),
    ]
  found = list(compiled.tpu_rows(chip, cases, num_workers))
  return [_row(found[i : i + 3]) for i in range(0, len(found), 3)]


def _row(found: Sequence[_Found]) -> harness.Row:
  """Of a known table, of one from data, and of arrays that are copied.

  Raises:
    JobFailed: If one of the three has no figures.
  """
  for case, row, report in found:
    if report is None or (case.kernel == "known" and row["note"]):
      raise jobs_lib.JobFailed(f"{case.kernel}, {case.facts}: {row['note']}")
  (_, known, _), (case, _, data), (_, _, copied) = found
  assert data is not None and copied is not None
  row = {
      "chip": known["chip"],
      **case.facts,
      "kernels": known["static_bundles"],
      "planning": data.fusion_cycles,
      "share": data.fusion_cycles / known["static_bundles"],
  }
  # For v7x XLA says of a copy that it takes the largest of all numbers.
  if copied.fusion_cycles < _UNKNOWN:
    row["copies"] = copied.fusion_cycles / _NUM_COPIED
  return row


def report(chip: chips.Chip, length: int) -> list[harness.Row]:
  """Prints what `measure` finds; returns it."""
  rows = measure(chip, length)
  print(
      f"\nBlock-sparse attention to a table from data, T={length:,},"
      f" {DENSITY:.0%} of the causal blocks, a head of {programs.HEAD_DIM} a"
      " core: bundles of the kernels, and the cycles that XLA expects of what"
      " is around them.\n"
  )
  print(harness.table(_COLUMNS, rows))
  return rows
