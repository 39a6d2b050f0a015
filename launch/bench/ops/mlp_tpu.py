"""Static figures of gathered MLPs on a TPU that is not there, and dense ones.

A part of `launch.bench.kernels` for --target=tpu:CHIP. The time of a kernel is
taken to be the longer of its schedule and its bytes at the peak of the memory;
how many slabs it copies is counted in its compiled code. The dense MLP is XLA's
own: its estimate of its cycles, or its bytes at that peak if those take longer.
Nothing is measured.
"""

from collections.abc import Sequence
import itertools

from kernels_pallas.aot import chips
from kernels_pallas.aot import jobs as jobs_lib
from kernels_pallas.aot import schedule
from kernels_pallas.gather_mlp import cost
from kernels_pallas.gather_mlp import shapes
from launch.bench import harness
from launch.bench.ops import compiled
from launch.bench.ops import peers
from launch.bench.ops import programs

# The two densities through which the line goes.
DENSITIES = (0.1, 0.3)
SHAPES = ("opt_6.7b", "opt_6.7b_b16", "llama3_8b", "llama3_8b_b16")
_COLUMNS: harness.Columns = {
    "shape": ("shape", str),
    "kernel": ("kernel", str),
    "hbm_mb": ("HBM MB", "{:.1f}".format),
    "byte_share": ("of dense", "{:.1%}".format),
    "copies": ("slabs a core", str),
    "static_bundles": ("bundles", "{:,}".format),
    "spills": ("spills", str),
    "temp_bytes": ("temp bytes", "{:,}".format),
    "static_us": ("static us", "{:.1f}".format),
    "hbm_us": ("HBM us", "{:.1f}".format),
    "time_us": ("estimate us", "{:.1f}".format),
}


def measure(
    chip: chips.Chip,
    names: Sequence[str] = SHAPES,
    num_workers: int = 2,
    densities: Sequence[float] = DENSITIES,
) -> list[harness.Row]:
  """A row for each dense MLP and each density of a gathered one.

  Args:
    chip: What for.
    names: In `shapes.BENCHMARKS`.
    num_workers: Compilers to run side by side.
    densities: Shares of the blocks.

  Raises:
    JobFailed: If one does not compile.
    ToolchainMissing: If the compiler is not installed.
  """
  cases = [
      _case(name, density)
      for name, density in itertools.product(names, (1.0, *densities))
  ]
  return [
      _timed(chip, case, row, report)
      for case, row, report in compiled.tpu_rows(chip, cases, num_workers)
  ]


def _case(name: str, density: float) -> compiled.Case:
  shape, facts = shapes.BENCHMARKS[name], {"shape": name}
  options: dict[str, str | float] = {"shape": name}
  dense = cost.dense(shape)
  if density == 1:
    return compiled.Case(
        kernel="dense MLP, XLA",
        program=peers.dense_mlp,
        options=options,
        work=dense,
        facts=facts,
    )
  num_blocks = round(density * shape.num_blocks)
  work = cost.forward(shape, num_blocks)
  return compiled.Case(
      kernel=f"gather MLP {density:.0%}",
      program=programs.gather_mlp,
      options=options | {"density": density},
      work=work,
      facts=facts
      | {
          "density": num_blocks / shape.num_blocks,
          "byte_share": work.bytes_accessed / dense.bytes_accessed,
      },
  )


def _timed(
    chip: chips.Chip,
    case: compiled.Case,
    row: harness.Row,
    report: schedule.Report | None,
) -> harness.Row:
  """The row with its time, of which the summary is made."""
  if report is None:
    raise jobs_lib.JobFailed(f"{case.kernel} of {row['shape']}: {row['note']}")
  # What XLA does before and after the kernel, or in its stead.
  around = 1e6 * report.fusion_cycles / chip.clock_hz
  if not report.kernels:
    time_us = max(around, row["hbm_us"])
    return row | {"static_us": around, "time_us": time_us}
  (kernel,) = report.kernels
  return row | {
      "copies": num_copies(kernel),
      "time_us": max(row.get("static_us", 0), row["hbm_us"]) + around,
  }


def num_copies(kernel: schedule.KernelSchedule) -> int:
  """How often the busiest core runs the code that has the products."""
  return sum(
      round(region.issued / region.bundles)
      for region in kernel.tree.walk()
      if region.units.get("MXU", 0) > 20
  )


def summary(rows: Sequence[harness.Row]) -> list[str]:
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


def report(chip: chips.Chip) -> list[harness.Row]:
  """Prints what `measure` finds; returns the rows."""
  rows = measure(chip)
  print(f"\nMLPs over chosen blocks of 128 neurons, bfloat16, {chip.name}:\n")
  print(harness.table(_COLUMNS, rows) + "\n")
  print("\n".join(summary(rows)))
  return rows
