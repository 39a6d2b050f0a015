"""Static figures of decode steps on a TPU that is not there.

A part of `launch.bench.kernels` for --target=tpu:CHIP: our step, which evicts,
over slots and over pages of 64, beside jax's paged attention to as many keys in
such pages, which computes no scores, chooses no slot and writes no key; and a
step that attends to codes of four bits, which evicts nothing and writes no key.
The
time of a kernel is taken to be the longer of its schedule and its bytes at the
peak of the memory. Nothing is measured.
"""

from collections.abc import Callable, Sequence
import functools
import itertools
from typing import Any

from kernels_pallas.aot import chips
from kernels_pallas.decode import cost
from kernels_pallas.decode import shapes
from kernels_pallas.decode.coded import cost as coded_cost
from launch.bench import harness
from launch.bench.ops import compiled
from launch.bench.ops import peers
from launch.bench.ops import programs

BATCHES = (1, 8, 64)
CAPACITIES = (512, 1024, 4096, 16_384)
_Work = Callable[[shapes.Shape], cost.Cost]
_BYTES_1: _Work = functools.partial(cost.step, cache_itemsize=1)
_BYTES_2: _Work = functools.partial(cost.step, cache_itemsize=2)
# Rows by name: a program, its options, and what has to be computed and moved.
KERNELS: dict[
    str, tuple[Callable[..., programs.Program], dict[str, Any], _Work]
] = {
    "decode": (programs.decode, {}, _BYTES_2),
    "decode int8": (programs.decode, {"cache_dtype": "int8"}, _BYTES_1),
    "decode int4": (programs.decode_coded, {}, coded_cost.attend),
    "decode paged": (programs.decode_paged, {}, _BYTES_2),
    "jax paged": (peers.paged, {}, _BYTES_2),
}
_COLUMNS: harness.Columns = {
    "batch": ("B", str),
    "slots": ("slots", "{:,}".format),
    "kernel": ("kernel", str),
    "hbm_mb": ("HBM MB", "{:.1f}".format),
    "static_bundles": ("bundles", "{:,}".format),
    "spills": ("spills", str),
    "temp_bytes": ("temp bytes", "{:,}".format),
    "static_us": ("static us", "{:.1f}".format),
    "hbm_us": ("HBM us", "{:.1f}".format),
    "of_roofline": ("of roofline", "{:.2f}".format),
    "note": ("note", str),
}


def measure(
    chip: chips.Chip,
    batches: Sequence[int] = BATCHES,
    capacities: Sequence[int] = CAPACITIES,
    num_workers: int = 2,
) -> list[harness.Row]:
  """A row for each kernel and size.

  Args:
    chip: What for.
    batches: Sequences.
    capacities: Slots, or keys.
    num_workers: Compilers to run side by side.

  Raises:
    ToolchainMissing: If the compiler is not installed.
  """
  cases = [
      _case(batch, capacity, name)
      for capacity, batch, name in itertools.product(
          capacities, batches, KERNELS
      )
  ]
  rows = []
  for _, row, _ in compiled.tpu_rows(chip, cases, num_workers):
    if "static_us" in row:
      row["time_us"] = max(row["static_us"], row["hbm_us"])
      row["of_roofline"] = row["time_us"] / row["hbm_us"]
    rows.append(row)
  return rows


def _case(batch: int, capacity: int, name: str) -> compiled.Case:
  program, options, work = KERNELS[name]
  shape = programs.decode_shape(batch, capacity)
  return compiled.Case(
      kernel=name,
      program=program,
      options={"batch": batch, "capacity": capacity} | options,
      work=work(shape),
      facts={"batch": batch, "slots": capacity},
  )


def summary(rows: Sequence[harness.Row]) -> list[str]:
  """How far from the bytes at the peak of the memory, at worst."""
  sentences = []
  for name in KERNELS:
    known = [x for x in rows if x["kernel"] == name and "of_roofline" in x]
    if known:
      worst = max(known, key=lambda x: x["of_roofline"])
      sentences.append(
          f"{name}: at most {worst['of_roofline']:.2f} of the roofline, with"
          f" {worst['slots']:,} slots of {worst['batch']} sequences"
      )
  return sentences


def report(chip: chips.Chip) -> list[harness.Row]:
  """Prints what `measure` finds; returns the rows."""
  rows = measure(chip)
  print(
      "\nDecode steps of 32 query and 8 key heads of 128, bfloat16,"
      f" {chip.name}:\n"
  )
  print(harness.table(_COLUMNS, rows) + "\n")
  print("\n".join(summary(rows)))
  return rows
