"""Time per pair of every mask family, beside dense causal attention's.

The part of `launch.bench.kernels --masks`. FLOPs are 4 H a pair forward and 2.5
times that backward. A tile costs as much whether all of its pairs are allowed
or one: time per pair is that of dense causal attention, times the pairs of the
visited tiles by the pairs that are allowed, where arithmetic is what takes
time. So each row says both. On a CPU programs take turns, see
`launch.bench.harness`; on a TPU that is not there figures are static.
"""

from collections.abc import Sequence
import functools
import itertools

import jax
from jaxtyping import Array
import numpy as np

from kernels_pallas import masks
from kernels_pallas import selection
from kernels_pallas.aot import chips
from kernels_pallas.attention import api
from kernels_pallas.attention import cost
from kernels_pallas.attention import shapes
from launch.bench import harness
from launch.bench.masks import families
from launch.bench.ops import compiled
from launch.bench.ops import programs

OPS = ("flash", "block-sparse")
DENSE = ("causal", "flash")
# Blocks of the selections on TPUs, and of all on a CPU.
_TPU_BLOCK = 512
_CPU_HEAD_DIM = 64
_COLUMNS: harness.Columns = {
    "family": ("family", str),
    "length": ("T", "{:,}".format),
    "op": ("op", str),
    "pairs": ("pairs", "{:,}".format),
    "gflops": ("GFLOP", "{:.2f}".format),
    "backward_gflops": ("backward", "{:.2f}".format),
    "visited": ("tiles visited", "{:,}".format),
    "full": ("full", "{:,}".format),
    "fill": ("visited pairs by allowed", "{:.2f}".format),
    "time": ("time", str),
    "per_pair": ("time a pair by dense causal's", "{:.2f}".format),
}


def report(target: str, lengths: Sequence[int]) -> list[harness.Row]:
  """Prints the table of a target; returns its rows.

  Args:
    target: cpu, or tpu:CHIP.
    lengths: T.
  """
  rows = []
  for length in lengths:
    if target == "cpu":
      found = cpu_rows(length)
    else:
      found = tpu_rows(chips.get_chip(target.partition(":")[2]), length)
    print(harness.table(_COLUMNS, found), flush=True)
    rows += found
  return rows


def where_of(
    family: str, length: int, op: str, block: int
) -> masks.Mask | selection.Selection:
  """A family's mask, or the blocks that it touches."""
  mask = families.FAMILIES[family](length)
  if op == "flash":
    return mask
  return selection.from_mask(
      mask, length, length, block_q=block, block_kv=block
  )


def program(
    family: str, length: int, op: str, num_heads: int = 1
) -> programs.Program:
  """The forward pass on TPUs; see `launch.bench.ops.compiled.Case`."""
  where = where_of(family, length, op, _TPU_BLOCK)

  def attend(*arrays: Array) -> Array:
    return api.attention(*arrays, where=where, implementation="pallas_tpu").out

  return attend, (programs.heads_last(length, num_heads),) * 3


def facts_of(
    family: str, length: int, op: str, head_dim: int, block: int
) -> harness.Row:
  """What is known of a row before anything runs.

  Args:
    family: Of `FAMILIES`.
    length: T.
    op: Of `OPS`.
    head_dim: H.
    block: Queries and keys of a tile.
  """
  mask = families.FAMILIES[family](length)
  pairs = families.num_pairs(mask)
  tiles = families.tiles_of(mask, length, block)
  shape = shapes.square(length, 1, 1, head_dim)
  return {
      "family": family,
      "length": length,
      "op": op,
      "pairs": pairs,
      "gflops": cost.forward(shape, pairs).flops / 1e9,
      "backward_gflops": cost.backward(shape, pairs).flops / 1e9,
      "visited": tiles.visited,
      "full": tiles.full,
      "fill": tiles.visited * block**2 / pairs,
  }


def cpu_rows(length: int, num_times: int = 5) -> list[harness.Row]:
  """Times every family on this machine, a head of 64.

  Args:
    length: T.
    num_times: Calls of each program.
  """
  shape = shapes.square(length, 1, 1, _CPU_HEAD_DIM)
  keys = jax.random.split(jax.random.key(0), 3)
  arrays = [
      jax.random.normal(key, array.shape)
      for key, array in zip(keys, shape.arrays("float32"), strict=True)
  ]
  names = list(itertools.product(families.FAMILIES, OPS))
  calls = {}
  for family, op in names:
    attend = functools.partial(
        api.attention,
        where=where_of(family, length, op, families.BLOCK),
        implementation="xla",
    )
    run = jax.jit(lambda *arrays, f=attend: f(*arrays).out)
    calls[_kernel(family, op)] = functools.partial(
        lambda f: jax.block_until_ready(f(*arrays)), run
    )
  times = harness.take_turns(calls, num_times, num_warm_ups=1)
  rows = []
  for family, op in names:
    facts = facts_of(family, length, op, _CPU_HEAD_DIM, families.BLOCK)
    seconds = float(np.median(times[_kernel(family, op)]))
    rows.append(facts | {"seconds": seconds, "time": f"{1e3 * seconds:.1f} ms"})
  return with_ratios(rows, "seconds")


def tpu_rows(
    chip: chips.Chip, length: int, num_workers: int = 2
) -> list[harness.Row]:
  """Compiles every family for a chip: static bundles of the forward pass."""
  names = list(itertools.product(families.FAMILIES, OPS))
  cases = [
      compiled.Case(
          kernel=_kernel(family, op),
          program=program,
          options={
              "family": family,
              "length": length,
              "op": op,
              "num_heads": chip.num_cores,
          },
          facts=facts_of(family, length, op, programs.HEAD_DIM, _TPU_BLOCK),
      )
      for family, op in names
  ]
  rows = []
  for _, row, _ in compiled.tpu_rows(chip, cases, num_workers):
    bundles = row.get("static_bundles")
    shown = row["note"] if bundles is None else f"{bundles:,} bundles"
    rows.append(row | {"time": shown})
  return with_ratios(rows, "static_bundles")


def _kernel(family: str, op: str) -> str:
  return f"{family}, {op}"


def with_ratios(rows: list[harness.Row], what: str) -> list[harness.Row]:
  """Adds what a pair takes by what it takes of dense causal attention.

  Args:
    rows: One a family and op; dense causal is among them.
    what: The field that says how long; rows without it get no ratio.
  """
  (dense,) = [row for row in rows if (row["family"], row["op"]) == DENSE]
  if dense.get(what) is None:
    return rows
  base = dense[what] / dense["pairs"]
  return [
      row | {"per_pair": row[what] / row["pairs"] / base}
      if row.get(what) is not None
      else row
      for row in rows
  ]
