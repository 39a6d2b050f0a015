"""Static figures of decode steps on a TPU that is not there.

A part of `launch.bench.kernels` for --target=tpu:CHIP: our step, which evicts,
over slots and over pages of 64, beside jax's paged attention to as many keys in
such pages, which computes no scores, chooses no slot and writes no key. The
time of a kernel is taken to be the longer of its schedule and its bytes at the
peak of the memory. Nothing is measured.
"""

from collections.abc import Callable, Sequence
from typing import Any

from kernels_pallas.aot import chips
from kernels_pallas.aot import jobs as jobs_lib
from kernels_pallas.aot import schedule
from kernels_pallas.decode import cost
from kernels_pallas.decode import shapes
from launch.bench import markdown

_PROGRAMS = "launch.bench.ops.programs:"
BATCHES = (1, 8, 64)
CAPACITIES = (512, 1024, 4096, 16_384)
# Rows by name: a program, its options, and bytes of a stored element.
KERNELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "decode": ("decode", {}, 2),
    "decode int8": ("decode", {"cache_dtype": "int8"}, 1),
    "decode paged": ("decode_paged", {}, 2),
    "jax paged": ("paged", {}, 2),
}

Row = dict[str, Any]


def measure(
    chip: chips.Chip,
    batches: Sequence[int] = BATCHES,
    capacities: Sequence[int] = CAPACITIES,
    num_workers: int = 2,
) -> list[Row]:
  """A row for each kernel and size.

  Args:
    chip: What for.
    batches: Sequences.
    capacities: Slots, or keys.
    num_workers: Compilers to run side by side.

  Raises:
    ToolchainMissing: If the compiler is not installed.
  """
  keys = [(b, c, name) for c in capacities for b in batches for name in KERNELS]
  jobs = [
      jobs_lib.Job(
          chip.name,
          _PROGRAMS + KERNELS[name][0],
          {"batch": batch, "capacity": capacity} | KERNELS[name][1],
      )
      for batch, capacity, name in keys
  ]
  results = jobs_lib.run(jobs, num_workers)
  return [
      _row(chip, *key, job, result)
      for key, job, result in zip(keys, jobs, results, strict=True)
  ]


def _row(
    chip: chips.Chip,
    batch: int,
    capacity: int,
    name: str,
    job: jobs_lib.Job,
    result: dict[str, Any],
) -> Row:
  shape = shapes.Shape(
      batch=batch, num_heads=32, num_kv_heads=8, capacity=capacity
  )
  work = cost.step(shape, cache_itemsize=KERNELS[name][2])
  hbm_us = 1e6 * work.bytes_accessed / chip.hbm_bytes_per_sec
  row = {"chip": chip.name, "batch": batch, "slots": capacity, "kernel": name}
  row |= {"hbm_mb": work.bytes_accessed / 1e6, "hbm_us": hbm_us}
  if "error" in result:
    return row | {"note": result["error"].splitlines()[0][:120]}
  jobs_lib.check(job, result)
  report = schedule.from_result(job, result)
  (kernel,) = report.kernels
  row |= {"temp_bytes": report.temp_bytes, "spills": kernel.spills}
  if kernel.issued is None:
    return row | {"note": kernel.undecided}
  static_us = 1e6 * schedule.seconds(kernel.issued, chip.name)
  time_us = max(static_us, hbm_us)
  return row | {
      "bundles": kernel.issued,
      "static_us": static_us,
      "time_us": time_us,
      "of_roofline": time_us / hbm_us,
      "note": "",
  }


def summary(rows: Sequence[Row]) -> list[str]:
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


_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "batch": ("B", str),
    "slots": ("slots", "{:,}".format),
    "kernel": ("kernel", str),
    "hbm_mb": ("HBM MB", "{:.1f}".format),
    "bundles": ("bundles", "{:,}".format),
    "spills": ("spills", str),
    "temp_bytes": ("temp bytes", "{:,}".format),
    "static_us": ("static us", "{:.1f}".format),
    "hbm_us": ("HBM us", "{:.1f}".format),
    "of_roofline": ("of roofline", "{:.2f}".format),
    "note": ("note", str),
}


def table(rows: Sequence[Row]) -> str:
  """Formats rows as a Markdown table."""
  return markdown.table(_COLUMNS, rows)


def report(chip: chips.Chip) -> list[Row]:
  """Prints what `measure` finds; returns the rows."""
  rows = measure(chip)
  print(
      "\nDecode steps of 32 query and 8 key heads of 128, bfloat16,"
      f" {chip.name}:\n"
  )
  print(table(rows) + "\n")
  print("\n".join(summary(rows)))
  return rows
