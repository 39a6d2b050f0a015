"""Static schedules of Pallas TPU kernels: cycles, were there no stalls.

libtpu writes the schedule of each kernel it compiles when undocumented flags
ask for it. What it leaves out: stalls on HBM, transfers around the kernel, and
how the two cores of a megacore chip share a grid (the schedule is one core's).
"""

from collections.abc import Sequence
import dataclasses
import pathlib
import re
from typing import Any

from kernels_pallas.aot import bundles as bundles_lib
from kernels_pallas.aot import chips
from kernels_pallas.aot import compile as compile_lib
from kernels_pallas.aot import jobs as jobs_lib
from kernels_pallas.aot import topology


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelSchedule:
  """The schedule of one Pallas kernel on one core.

  Attributes:
    name: Of its call in the compiled program.
    chip: What for.
    tree: Its loops and branches.
    capacity: Operations that each unit can issue in a bundle.
    vmem_bytes: Scoped VMEM that it takes.
  """

  name: str
  chip: str
  tree: bundles_lib.Region
  capacity: dict[str, int]
  vmem_bytes: int

  @property
  def bundles(self) -> int:
    """Length of the code."""
    return self.tree.total_bundles

  @property
  def units(self) -> dict[str, int]:
    """Operations in the code, by unit."""
    regions = list(self.tree.walk())
    return {u: sum(r.units.get(u, 0) for r in regions) for u in self.capacity}

  @property
  def spills(self) -> int:
    """Stores of vector registers that ran out."""
    return self.units.get("VSTORE:SPILL", 0)

  @property
  def fills(self) -> int:
    """Loads of what was spilled."""
    return self.units.get("VLOAD:FILL", 0)

  def __str__(self) -> str:
    """A line a region: index in `estimate`, kind, bundles, units."""
    lines = [f"{self.name} on {self.chip}: {self.bundles} bundles"]
    depth = {id(self.tree): 0}
    for index, region in enumerate(self.tree.walk()):
      depth |= {id(x): depth[id(region)] + 1 for x in region.regions}
      work = " ".join(f"{u}={n}" for u, n in region.units.items() if n)
      kind = "  " * depth[id(region)] + region.kind
      lines.append(
          f"{index - 1:>3} {kind:<16} at {region.start:<6}"
          f" {region.bundles:>6} bundles {work}"
      )
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
  """What the compiler says of one job.

  Attributes:
    job: The program.
    kernels: Its Pallas kernels, in the order of the program's text.
    fusion_cycles: What XLA expects the rest of it to take.
    temp_bytes: What the program allocates beside arguments and outputs.
  """

  job: jobs_lib.Job
  kernels: tuple[KernelSchedule, ...]
  fusion_cycles: int
  temp_bytes: int


def report(jobs: Sequence[jobs_lib.Job]) -> list[Report]:
  """Compiles TPU programs and returns the schedules of their kernels.

  All in one process beside this one; about two seconds, and one a program.

  Raises:
    JobFailed: If a program does not compile.
    ToolchainMissing: If libtpu is not there, or writes no schedules.
  """
  reports = []
  for job, result in zip(jobs, jobs_lib.run(jobs), strict=True):
    jobs_lib.check(job, result)
    kernels = tuple(map(_from_json, result.pop("kernels")))
    reports.append(Report(job=job, kernels=kernels, **result))
  return reports


def estimate(schedule: KernelSchedule, runs: Sequence[int]) -> int:
  """Bundles of a whole kernel: sum over regions of bundles times runs.

  Args:
    schedule: The kernel.
    runs: How often the code of each region is run in all: the iterations of a
      loop, summed over all its entries; how often a branch is not skipped. In
      the order of `schedule.tree.walk()` without the kernel itself.
  """
  root, *regions = schedule.tree.walk()
  if len(runs) != len(regions):
    raise ValueError(f"{len(runs)} runs for {len(regions)} regions: {schedule}")
  inner = sum(r.bundles * n for r, n in zip(regions, runs, strict=True))
  return root.bundles + inner


def seconds(bundles: int, chip: str) -> float:
  """Time of so many bundles, without a stall, on one core."""
  return bundles / chips.get_chip(chip).clock_hz


def read(
    compiled: compile_lib.Compiled, folder: pathlib.Path
) -> list[KernelSchedule]:
  """Reads the dumps of what was just compiled; the worker's part of `report`.

  Raises:
    ToolchainMissing: If a kernel has none.
  """
  found = []
  for name, vmem_bytes in compiled.scoped_vmem_bytes.items():
    units_text = _dump(folder, name, "final_hlo-static-per-bundle-utilization")
    capacity, units = bundles_lib.parse_units(units_text)
    tree = bundles_lib.parse_tree(
        _dump(folder, name, "final_bundles"), units, compiled.chip.branch_delay
    )
    found.append(
        KernelSchedule(
            name=name,
            chip=compiled.chip.name,
            tree=tree,
            capacity=capacity,
            vmem_bytes=vmem_bytes,
        )
    )
  return found


def _dump(folder: pathlib.Path, kernel: str, kind: str) -> str:
  """Text of the file <time>-<kernel>-<number>-<kind>.txt."""
  pattern = re.compile(rf"\d+-{re.escape(kernel)}-\d+-{kind}\.txt")
  paths = [path for path in folder.iterdir() if pattern.fullmatch(path.name)]
  if not paths:
    raise topology.ToolchainMissing(
        f"libtpu wrote no {kind} of {kernel}; its dump flags are undocumented"
        " and this version may not have them"
    )
  return paths[0].read_text()


def _from_json(fields: dict[str, Any]) -> KernelSchedule:
  tree = bundles_lib.Region.from_json(fields["tree"])
  return KernelSchedule(**fields | {"tree": tree})
