"""Compilations in a process of their own.

libtpu and Mosaic GPU read the flags that make them dump what they did once,
when they are loaded, so a worker loads them anew, for many jobs.
"""

from collections.abc import Mapping, Sequence
from concurrent import futures
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from kernels_pallas.aot import chips
from kernels_pallas.aot import topology

# What `schedule` reads; all passes would be fifty times as much.
_PASSES = "final_.*"


class JobFailed(RuntimeError):
  """A job's program does not compile, or the worker died."""


@dataclasses.dataclass(frozen=True)
class Job:
  """A program to compile, named so that another process can build it.

  Attributes:
    chip: What for.
    program: "package.module:function". The function returns (fn, args), the
      arguments of `compile_for`.
    kwargs: Its arguments, as JSON has them.
  """

  chip: str
  program: str
  kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def run(jobs: Sequence[Job], num_workers: int = 1) -> list[dict[str, Any]]:
  """Runs the jobs, one after the other in each worker.

  Args:
    jobs: What to compile.
    num_workers: Processes to share them.

  Returns:
    What the worker says of each: {"kernels": [...], ...} or {"error": ...}.

  Raises:
    JobFailed: If the worker dies; the last lines of its log are in the message.
    ToolchainMissing: If what compiles for one of the chips is not installed.
  """
  for platform in {chips.get_chip(job.chip).platform for job in jobs}:
    topology.require(platform)
  if num_workers == 1 or len(jobs) < 2:
    return _run(jobs)
  with futures.ThreadPoolExecutor(num_workers) as pool:
    parts = list(
        pool.map(_run, (jobs[i::num_workers] for i in range(num_workers)))
    )
  # Back in the order of the jobs.
  return [parts[i % num_workers][i // num_workers] for i in range(len(jobs))]


def _run(jobs: Sequence[Job]) -> list[dict[str, Any]]:
  """Runs the jobs in one worker."""
  with tempfile.TemporaryDirectory(prefix="aot_") as folder:
    path = pathlib.Path(folder)
    dumps = path / "dumps"
    dumps.mkdir()
    (path / "jobs").write_text(
        json.dumps([dataclasses.asdict(j) for j in jobs])
    )
    with open(path / "log", "wb") as log:
      status = subprocess.run(
          [sys.executable, "-m", "kernels_pallas.aot.worker", folder],
          env=_environment(dumps),
          stdout=log,
          stderr=log,
      ).returncode
    if status:
      tail = (path / "log").read_text(errors="replace").splitlines()[-15:]
      raise JobFailed("\n".join([f"worker exited with {status}", *tail]))
    return json.loads((path / "results").read_text())


def check(job: Job, result: Mapping[str, Any]) -> None:
  """Raises what went wrong with a job, if anything did."""
  if "missing" in result:
    raise topology.ToolchainMissing(result["missing"])
  if "error" in result:
    raise JobFailed(f"{job}: {result['error']}")


def _environment(dumps: pathlib.Path) -> dict[str, str]:
  flags = (
      f"--xla_jf_dump_to={dumps} --xla_jf_dump_llo_text=true"
      f" --xla_jf_dump_llo_pass_label_regex={_PASSES}"
  )
  return os.environ | {
      "JAX_PLATFORMS": "cpu",
      "JAX_ENABLE_COMPILATION_CACHE": "false",  # A hit would dump nothing.
      "LIBTPU_INIT_ARGS": f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}",
      "MOSAIC_GPU_DUMP_TO": str(dumps),
      "MOSAIC_GPU_DUMP_PTX": "1",
      "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
  }
