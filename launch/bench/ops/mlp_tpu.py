"""Static figures of gathered MLPs on a TPU that is not there, and dense ones.

A part of `launch.bench.kernels` for --target=tpu:CHIP. The time of a kernel is
taken to be the longer of its schedule and its bytes at the peak of the memory;
how many slabs it copies is counted in its compiled code. The dense MLP is XLA's
own: its estimate of its cycles, or its bytes at that peak if those take longer.
Nothing is measured.
"""

from collections.abc import Callable, Sequence
from typing import Any

from kernels_pallas.aot import chips
from kernels_pallas.aot import jobs as jobs_lib
from kernels_pallas.aot import schedule
from kernels_pallas.gather_mlp import cost
from kernels_pallas.gather_mlp import shapes
from launch.bench import markdown

_PROGRAMS = "launch.bench.ops.programs:"
# The two densities through which the line goes.
DENSITIES = (0.1, 0.3)
SHAPES = ("opt_6.7b", "opt_6.7b_b16", "llama3_8b", "llama3_8b_b16")

Row = dict[str, Any]


def measure(
    chip: chips.Chip, names: Sequence[str] = SHAPES, num_workers: int = 2
) -> list[Row]:
  """A row for each dense MLP and each density of a gathered one.

  Args:
    chip: What for.
    names: In `shapes.BENCHMARKS`.
    num_workers: Compilers to run side by side.

  Raises:
    ToolchainMissing: If the compiler is not installed.
  """
  keys = [(name, density) for name in names for density in (1.0, *DENSITIES)]
  jobs = [
      jobs_lib.Job(chip.name, _PROGRAMS + "dense_mlp", {"shape": name})
      if density == 1.0
      else jobs_lib.Job(
          chip.name,
          _PROGRAMS + "gather_mlp",
          {"shape": name, "density": density},
      )
      for name, density in keys
  ]
  results = jobs_lib.run(jobs, num_workers)
  rows = []
  for (name, density), job, result in zip(keys, jobs, results, strict=True):
    jobs_lib.check(job, result)
    report = schedule.from_result(job, result)
    rows.append(_row(chip, name, density, report))
  return rows


def _row(
    chip: chips.Chip, name: str, density: float, report: schedule.Report
) -> Row:
  shape = shapes.BENCHMARKS[name]
  around = 1e6 * report.fusion_cycles / chip.clock_hz
  row: Row = {"chip": chip.name, "shape": name, "kernel": "dense MLP, XLA"}
  row |= {"hbm_mb": cost.dense(shape).bytes_accessed / 1e6}
  if not report.kernels:
    row["hbm_us"] = 1e12 * row["hbm_mb"] / chip.hbm_bytes_per_sec
    return row | {"static_us": around, "time_us": max(around, row["hbm_us"])}
  (kernel,) = report.kernels
  num_blocks = round(density * shape.num_blocks)
  work = cost.forward(shape, num_blocks)
  hbm_us = 1e6 * work.bytes_accessed / chip.hbm_bytes_per_sec
  static_us = 1e6 * schedule.seconds(kernel.issued or 0, chip.name)
  return row | {
      "kernel": f"gather MLP {density:.0%}",
      "density": num_blocks / shape.num_blocks,
      "hbm_mb": work.bytes_accessed / 1e6,
      "byte_share": work.bytes_accessed / cost.dense(shape).bytes_accessed,
      "copies": num_copies(kernel),
      "bundles": kernel.issued,
      "spills": kernel.spills,
      "temp_bytes": report.temp_bytes,
      "hbm_us": hbm_us,
      "static_us": static_us,
      "time_us": max(static_us, hbm_us) + around,
  }


def num_copies(kernel: schedule.KernelSchedule) -> int:
  """How often the busiest core runs the code that has the products."""
  return sum(
      round(region.issued / region.bundles)
      for region in kernel.tree.walk()
      if region.units.get("MXU", 0) > 20
  )


def summary(rows: Sequence[Row]) -> list[str]:
  """Below which density a gathered MLP is faster than a dense one."""
  sentences = []
  for name in dict.fromkeys(row["shape"] for row in rows):
    dense, low, high = (row for row in rows if row["shape"] == name)
    slope = (high["time_us"] - low["time_us"]) / (
        high["density"] - low["density"]
    )
    densities = [
        low["density"] + (dense[key] - low["time_us"]) / slope
        for key in ("time_us", "hbm_us")
    ]
    sentences.append(
        f"{name}: faster than XLA's dense MLP below a density of"
        f" {min(densities[0], 1):.0%}, than a dense one at the peak of the"
        f" memory below {min(densities[1], 1):.0%}; at {low['density']:.0%}"
        f" {dense['time_us'] / low['time_us']:.1f}x and"
        f" {dense['hbm_us'] / low['time_us']:.1f}x"
    )
  return sentences


_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "shape": ("shape", str),
    "kernel": ("kernel", str),
    "hbm_mb": ("HBM MB", "{:.1f}".format),
    "byte_share": ("of dense", "{:.1%}".format),
    "copies": ("slabs a core", str),
    "bundles": ("bundles", "{:,}".format),
    "spills": ("spills", str),
    "temp_bytes": ("temp bytes", "{:,}".format),
    "static_us": ("static us", "{:.1f}".format),
    "hbm_us": ("HBM us", "{:.1f}".format),
    "time_us": ("estimate us", "{:.1f}".format),
}


def table(rows: Sequence[Row]) -> str:
  """Formats rows as a Markdown table."""
  return markdown.table(_COLUMNS, rows)


def report(chip: chips.Chip) -> list[Row]:
  """Prints what `measure` finds; returns the rows."""
  rows = measure(chip)
  print(f"\nMLPs over chosen blocks of 128 neurons, bfloat16, {chip.name}:\n")
  print(table(rows) + "\n")
  print("\n".join(summary(rows)))
  return rows
