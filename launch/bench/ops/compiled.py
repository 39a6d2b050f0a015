"""Rows of programs that are compiled for a chip that is not there.

A figure of bundles is what a core issues from a kernel's start to its end: the
compiler's schedule, its branches and loops followed with the tables that the
program passes (`kernels_pallas.aot.control`). Registers and spills of a GPU's
kernels are those that ptxas tells. Nothing is measured.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import re
from typing import Any

from kernels_pallas.aot import chips
from kernels_pallas.aot import jobs as jobs_lib
from kernels_pallas.aot import ptx
from kernels_pallas.aot import schedule
from kernels_pallas.aot import topology
from kernels_pallas.attention import cost
from launch.bench import harness
from launch.bench.ops import programs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """A program to compile, and what it is for.

  Attributes:
    kernel: Name of the row.
    program: A function of `launch.bench.ops.programs` or `peers`.
    options: Its arguments.
    work: What has to be computed and moved; None leaves the roofline out.
    facts: What the row says beside: length, batch, shape.
    last: How many kernels count, from the last of the program on; 0 is all.
  """

  kernel: str
  program: Callable[..., programs.Program]
  options: Mapping[str, Any]
  work: cost.Cost | None = None
  facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  last: int = 0


def tpu_rows(
    chip: chips.Chip, cases: Sequence[Case], num_workers: int = 2
) -> Iterator[tuple[Case, harness.Row, schedule.Report | None]]:
  """Yields each case with its row, and the report where there is one.

  Args:
    chip: What for.
    cases: What to compile.
    num_workers: Compilers to run side by side.

  Raises:
    ToolchainMissing: If the compiler is not installed.
  """
  for case, job, result in _compile(chip.name, cases, num_workers):
    yield case, *tpu_row(chip, case, job, result)


def tpu_row(
    chip: chips.Chip, case: Case, job: jobs_lib.Job, result: dict[str, Any]
) -> tuple[harness.Row, schedule.Report | None]:
  """The figures of a case, or a note that says why there are none."""
  row: harness.Row = {"chip": chip.name, **case.facts, "kernel": case.kernel}
  if case.work is not None:
    row |= roofline(chip, case.work)
  if "error" in result:
    return row | {"note": result["error"].splitlines()[0][:160]}, None
  jobs_lib.check(job, result)
  report = schedule.from_result(job, result)
  if not report.kernels:  # XLA's own.
    return row | {"temp_bytes": report.temp_bytes, "note": ""}, report
  kernels = report.kernels[-case.last :]
  steps = schedule.total(kernel.num_steps for kernel in kernels)
  row |= {
      "vmem_mib": max(kernel.vmem_bytes for kernel in kernels) / 2**20,
      "spills": sum(kernel.spills for kernel in kernels),
      "temp_bytes": report.temp_bytes,
      "temp_mib": report.temp_bytes / 2**20,
      # Of the busier core, where there is more than one.
      "steps": steps and -(-steps // chip.num_cores),
  }
  bundles = schedule.total(kernel.issued for kernel in kernels)
  if bundles is None:
    reasons = (kernel.undecided for kernel in kernels)
    return row | {"note": next(filter(None, reasons))}, report
  static_us = 1e6 * schedule.seconds(bundles, chip.name)
  row |= {"static_bundles": bundles, "static_us": static_us, "note": ""}
  if steps:
    row["per_step"] = bundles / row["steps"]
  return row, report


def h100_rows(cases: Sequence[Case], num_workers: int = 2) -> list[harness.Row]:
  """A row for each kernel of each case.

  Raises:
    ToolchainMissing: If the CUDA plugin or ptxas is not there.
  """
  ptx.require()
  rows = []
  for compiled in _compile("h100", cases, num_workers):
    rows += h100_rows_of(*compiled)
  return rows


def h100_rows_of(
    case: Case, job: jobs_lib.Job, result: dict[str, Any]
) -> list[harness.Row]:
  """The rows of a compilation; one that says why there are none.

  Raises:
    ToolchainMissing: If the compiler is.
  """
  row: harness.Row = {**case.facts, "note": ""}
  if "missing" in result:
    raise topology.ToolchainMissing(result["missing"])
  if "error" in result:
    return [row | {"kernel": "", "note": result["error"].splitlines()[0][:160]}]
  report = ptx.from_result(job, result)
  return [
      row
      | {
          # Without the number that its dump has.
          "kernel": re.sub(r"_\d+$", "", kernel.name),
          "registers": kernel.registers,
          "spilled_bytes": kernel.spill_store_bytes,
          "smem_kib": kernel.smem_bytes / 2**10,
          "num_wgmma": kernel.num_wgmma,
          "num_tma_loads": kernel.num_tma_loads,
          "temp_mib": report.temp_bytes / 2**20,
      }
      for kernel in report.kernels
  ]


def roofline(chip: chips.Chip, work: cost.Cost) -> harness.Row:
  """Operations, bytes, and the times that both take at the chip's peaks."""
  rates = chip.bf16_flops_per_sec, chip.hbm_bytes_per_sec
  return {
      "gflops": work.flops / 1e9,
      "hbm_mb": work.bytes_accessed / 1e6,
      "hbm_us": 1e6 * work.bytes_accessed / chip.hbm_bytes_per_sec,
      "roofline_us": 1e6 * work.seconds(*rates),
  }


def job_of(
    chip: str,
    program: Callable[..., programs.Program],
    options: Mapping[str, Any],
) -> jobs_lib.Job:
  """The compilation, by the program's name: another process builds it."""
  name = f"{program.__module__}:{program.__name__}"
  return jobs_lib.Job(chip, name, options)


def _compile(
    chip: str, cases: Sequence[Case], num_workers: int
) -> Iterator[tuple[Case, jobs_lib.Job, dict[str, Any]]]:
  jobs = [job_of(chip, case.program, case.options) for case in cases]
  yield from zip(cases, jobs, jobs_lib.run(jobs, num_workers), strict=True)
