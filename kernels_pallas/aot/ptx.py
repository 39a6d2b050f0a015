"""Registers, spills and instructions of Mosaic GPU kernels, from ptxas.

The compiler of kernels written with `plgpu.kernel` reports them when
`MOSAIC_GPU_DUMP_TO` and `MOSAIC_GPU_DUMP_PTX` are set. It needs `ptxas` on the
path.
"""

from collections.abc import Sequence
import dataclasses
import pathlib
import re
import shutil
from typing import Any

from kernels_pallas.aot import compile as compile_lib
from kernels_pallas.aot import jobs as jobs_lib
from kernels_pallas.aot import topology


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelPtx:
  """What ptxas made of one kernel.

  Attributes:
    name: The kernel's.
    registers: Of a thread, before any `setmaxnreg`.
    spill_store_bytes: Stored by a thread for want of registers.
    spill_load_bytes: Loaded again.
    smem_bytes: Shared memory of a block, barriers not counted.
    num_wgmma: Matrix instructions in the code.
    num_tma_loads: Bulk tensor copies into shared memory in the code.
    num_tma_stores: And out of it.
  """

  name: str
  registers: int
  spill_store_bytes: int
  spill_load_bytes: int
  smem_bytes: int
  num_wgmma: int
  num_tma_loads: int
  num_tma_stores: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
  """What the compiler says of one job.

  Attributes:
    job: The program.
    kernels: Its Mosaic GPU kernels.
    temp_bytes: What the program allocates beside arguments and outputs.
  """

  job: jobs_lib.Job
  kernels: tuple[KernelPtx, ...]
  temp_bytes: int


def report(jobs: Sequence[jobs_lib.Job]) -> list[Report]:
  """Compiles GPU programs and returns what ptxas says of their kernels.

  Raises:
    JobFailed: If a program does not compile.
    ToolchainMissing: If the CUDA plugin or ptxas is not there.
  """
  require()
  results = jobs_lib.run(jobs)
  for job, result in zip(jobs, results, strict=True):
    jobs_lib.check(job, result)
  return [from_result(*pair) for pair in zip(jobs, results, strict=True)]


def require() -> None:
  """Raises ToolchainMissing unless the CUDA plugin and ptxas are there."""
  if shutil.which("ptxas") is None:
    raise topology.ToolchainMissing(
        "ptxas is not on the path; it comes with CUDA or nvidia-cuda-nvcc"
    )
  topology.require("cuda")


def from_result(job: jobs_lib.Job, result: dict[str, Any]) -> Report:
  """The report of a job that went well."""
  kernels = tuple(KernelPtx(**kernel) for kernel in result["kernels"])
  return Report(job=job, kernels=kernels, temp_bytes=result["temp_bytes"])


def read(
    compiled: compile_lib.Compiled, folder: pathlib.Path
) -> list[KernelPtx]:
  """Reads the dumps of what was just compiled; the worker's part of `report`.

  Raises:
    ToolchainMissing: If there are Mosaic GPU kernels and no dumps.
  """
  # One set of dumps a kernel, by its name.
  paths = sorted(folder.glob("*.ptx"))
  if compiled.num_custom_calls and not paths:
    raise topology.ToolchainMissing("Mosaic GPU wrote no PTX")
  return [
      parse(
          path.stem,
          path.read_text(),
          path.with_suffix(".ptxas").read_text(),
          path.with_suffix(".resources.txt").read_text(),
      )
      for path in paths
  ]


def parse(name: str, ptx: str, ptxas: str, resources: str) -> KernelPtx:
  """Reads the three dumps of a kernel."""
  number = lambda pattern, text: sum(map(int, re.findall(pattern, text)))
  count = lambda pattern: len(re.findall(pattern, ptx))
  return KernelPtx(
      name=name,
      registers=number(r"Used (\d+) registers", ptxas),
      spill_store_bytes=number(r"(\d+) bytes spill stores", ptxas),
      spill_load_bytes=number(r"(\d+) bytes spill loads", ptxas),
      smem_bytes=number(r"smem_scratch_bytes=(\d+)", resources),
      num_wgmma=count(r"\bwgmma\.mma_async"),
      num_tma_loads=count(r"\bcp\.async\.bulk\.tensor\.\dd\.shared"),
      num_tma_stores=count(r"\bcp\.async\.bulk\.tensor\.\dd\.global"),
  )
