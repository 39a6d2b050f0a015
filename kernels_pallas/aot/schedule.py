"""Static schedules of Pallas TPU kernels: cycles, were there no stalls.

libtpu writes the schedule of each kernel it compiles when undocumented flags
ask for it. How often each loop runs is found by running its scalar half, see
`control`. What all this leaves out: stalls on HBM, and transfers around the
kernel. Of the two cores of a megacore chip the busier one is reported.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import pathlib
import re
from typing import Any

from kernels_pallas.aot import bundles as bundles_lib
from kernels_pallas.aot import chips
from kernels_pallas.aot import compile as compile_lib
from kernels_pallas.aot import control
from kernels_pallas.aot import jobs as jobs_lib
from kernels_pallas.aot import operands as operands_lib
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
    num_steps: Of its grid, on all cores; None if data decide.
    undecided: Why it is not known how often its loops run; "" if it is.
  """

  name: str
  chip: str
  tree: bundles_lib.Region
  capacity: dict[str, int]
  vmem_bytes: int
  num_steps: int | None = None
  undecided: str = ""

  @property
  def bundles(self) -> int:
    """Length of the code."""
    return self.tree.total_bundles

  @property
  def issued(self) -> int | None:
    """Bundles that a core issues from its start to its end; None if unknown."""
    if self.undecided:
      return None
    return sum(region.issued for region in self.tree.walk())

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
    """A line a region: kind, bundles, times that they are issued, units."""
    lines = [
        f"{self.name} on {self.chip}: {self.bundles} bundles, issued"
        f" {self.issued or self.undecided}"
    ]
    depth = {id(self.tree): 0}
    for region in self.tree.walk():
      depth |= {id(x): depth[id(region)] + 1 for x in region.regions}
      work = " ".join(f"{u}={n}" for u, n in region.units.items() if n)
      kind = "  " * depth[id(region)] + region.kind
      lines.append(
          f"{kind:<20} at {region.start:<6} {region.bundles:>6} bundles"
          f" {region.issued:>10} issued {work}"
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

  All in one process beside this one; about two seconds, and a few a program.

  Raises:
    JobFailed: If a program does not compile.
    ToolchainMissing: If libtpu is not there, or writes no schedules.
  """
  results = jobs_lib.run(jobs)
  for job, result in zip(jobs, results, strict=True):
    jobs_lib.check(job, result)
  return [from_result(*pair) for pair in zip(jobs, results, strict=True)]


def from_result(job: jobs_lib.Job, result: dict[str, Any]) -> Report:
  """The report of a job that went well."""
  kernels = tuple(map(_from_json, result["kernels"]))
  return Report(job=job, **result | {"kernels": kernels})


def total(numbers: Iterable[int | None]) -> int | None:
  """Their sum; None if one of them is."""
  numbers = list(numbers)
  known = [n for n in numbers if n is not None]
  return sum(known) if len(known) == len(numbers) else None


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
  found, chip = [], compiled.chip
  calls = operands_lib.of_kernels(compiled.jaxpr, compiled.hlo)
  for name, vmem_bytes in compiled.scoped_vmem_bytes.items():
    units_text = _dump(folder, name, "final_hlo-static-per-bundle-utilization")
    capacity, units = bundles_lib.parse_units(units_text)
    code = bundles_lib.parse_code(_dump(folder, name, "final_bundles"))
    # How often loops run follows from the tables that the program passes.
    issued, undecided = _issued(code, chip, calls[name].images)
    found.append(
        KernelSchedule(
            name=name,
            chip=chip.name,
            tree=bundles_lib.make_tree(code, units, chip.branch_delay, issued),
            capacity=capacity,
            vmem_bytes=vmem_bytes,
            num_steps=calls[name].num_steps,
            undecided=undecided,
        )
    )
  return found


def _issued(
    code: bundles_lib.Code,
    chip: chips.Chip,
    operands: dict[int, Any],
) -> tuple[Any, str]:
  """How often the busiest core issues each bundle, or why that is unknown."""
  try:
    cores = range(chip.num_cores)
    counts = [control.count(code, chip, operands, core) for core in cores]
  except control.Undecided as error:
    return None, str(error)
  # The kernel ends when its slower core does.
  return max(counts, key=lambda x: x.sum()), ""


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
