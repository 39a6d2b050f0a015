"""The figures of `kernels_pallas/aot/budgets.json` and how they are made.

  python -m launch.bench.kernels --update_budgets

writes them anew, for the libtpu that is installed: bundles issued (static),
spills in the code, and bytes that the program allocates.
"""

from collections.abc import Callable, Sequence
import inspect
import pathlib
from typing import Any

from kernels_pallas.aot import budgets
from kernels_pallas.aot import chips
from kernels_pallas.aot import jobs as jobs_lib
from kernels_pallas.aot import schedule
from launch.bench import harness
from launch.bench.ops import compiled
from launch.bench.ops import programs
from launch.bench.recurrent import delta

_DENSE = {"length": 2048}
_EMITS = _DENSE | {"return_col_mass": True}
_SPARSE = {"length": 4096, "block_q": 512, "block_kv": 512, "density": 0.25}
_LINEAR = {"length": 8192}
_GATHER = {"shape": "llama3_8b_b16", "density": 0.1}
_DECODE = {"batch": 4, "capacity": 1024}
_DELTA = {"length": 1024}
# Program, arguments, and how many of its last kernels count.
CASES: dict[
    str, tuple[Callable[..., programs.Program], dict[str, Any], int]
] = {
    "forward": (programs.forward, _DENSE, 0),
    "forward + col_mass": (programs.forward, _EMITS, 0),
    "column sums alone": (
        programs.forward,
        _EMITS | {"col_mass": "two_pass"},
        1,
    ),
    "backward": (programs.backward, _DENSE, 1),
    "block-sparse": (programs.sparse, _SPARSE, 0),
    "block-sparse backward": (
        programs.sparse,
        _SPARSE | {"is_backward": True},
        1,
    ),
    "linear": (programs.linear, _LINEAR, 0),
    "linear reversed": (programs.linear_sweep, _LINEAR, 0),
    "gather MLP": (programs.gather_mlp, _GATHER, 0),
    "decode": (programs.decode, _DECODE, 0),
    "decode int8": (programs.decode, _DECODE | {"cache_dtype": "int8"}, 0),
    "decode paged": (programs.decode_paged, _DECODE, 0),
    "gather MLP backward": (
        programs.gather_mlp,
        _GATHER | {"is_backward": True},
        1,
    ),
    "gated delta rule": (delta.delta, _DELTA, 0),
    "gated delta rule by channel, backward": (
        delta.delta,
        _DELTA | {"is_by_channel": True, "is_backward": True},
        2,
    ),
}


def compile_cases(
    chip_names: Sequence[str], num_workers: int = 1
) -> dict[tuple[str, str], schedule.Report]:
  """Compiles every case for these chips; reports by case and chip.

  Raises:
    JobFailed: If one does not compile.
    ToolchainMissing: If the compiler is not installed.
  """
  keys, jobs = [], []
  for chip in map(chips.get_chip, chip_names):
    for case, (program, options, _) in CASES.items():
      if "num_heads" in inspect.signature(program).parameters:  # One a core.
        options = options | {"num_heads": chip.num_cores}
      keys.append((case, chip.name))
      jobs.append(compiled.job_of(chip.name, program, options))
  results = jobs_lib.run(jobs, num_workers)
  for job, result in zip(jobs, results, strict=True):
    jobs_lib.check(job, result)
  return {
      key: schedule.from_result(job, result)
      for key, job, result in zip(keys, jobs, results, strict=True)
  }


def figures(case: str, report: schedule.Report) -> dict[str, int]:
  """What is kept of a report."""
  kernels = report.kernels[-CASES[case][2] :]
  found = {
      "bundles": schedule.total(kernel.issued for kernel in kernels),
      "spills": sum(kernel.spills for kernel in kernels),
      "temp_bytes": report.temp_bytes,
  }
  return {name: n for name, n in found.items() if n is not None}


def update(path: pathlib.Path = budgets.PATH) -> list[harness.Row]:
  """Writes the figures of all chips as the installed compiler's."""
  reports = compile_cases(chips.TPU_NAMES, num_workers=2)
  measured: budgets.Budgets = {}
  for (case, chip), report in reports.items():
    measured.setdefault(case, {})[chip] = figures(case, report)
  version = budgets.compiler("tpu")
  budgets.update(measured, version, path)
  print(f"{len(reports)} budgets of {version} written to {path.name}")
  return [
      {"case": case, "chip": chip, **figures(case, report)}
      for (case, chip), report in reports.items()
  ]
