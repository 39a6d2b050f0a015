"""The process in which `jobs.run` compiles: python -m ... FOLDER.

FOLDER holds `jobs` (JSON), gets `results` (JSON), and has `dumps`, into which
the compilers write tens of megabytes a kernel: emptied after each job.
"""

import dataclasses
import importlib
import json
import pathlib
import shutil
import sys
from typing import Any

from kernels_pallas.aot import compile as compile_lib
from kernels_pallas.aot import hlo
from kernels_pallas.aot import ptx
from kernels_pallas.aot import schedule
from kernels_pallas.aot import topology


def main(folder: pathlib.Path) -> None:
  """Runs the jobs of the folder."""
  jobs = json.loads((folder / "jobs").read_text())
  results = [_run(job, folder / "dumps") for job in jobs]
  (folder / "results").write_text(json.dumps(results))


def _run(job: dict[str, Any], dumps: pathlib.Path) -> dict[str, Any]:
  module, _, function = job["program"].partition(":")
  build = getattr(importlib.import_module(module), function)
  try:
    fn, args = build(**job["kwargs"])
    _empty(dumps)
    compiled = compile_lib.compile_for(job["chip"], fn, *args)
    read = ptx.read if compiled.chip.platform == "cuda" else schedule.read
    kernels = [dataclasses.asdict(kernel) for kernel in read(compiled, dumps)]
    return _facts(compiled) | {"kernels": kernels}
  except topology.ToolchainMissing as error:
    return {"missing": str(error)}
  except Exception as error:  # Compilers raise of every kind.
    return {"error": f"{type(error).__name__}: {error}"}
  finally:
    _empty(dumps)


def _facts(compiled: compile_lib.Compiled) -> dict[str, Any]:
  return {
      "temp_bytes": compiled.temp_bytes,
      "fusion_cycles": hlo.fusion_cycles(compiled.hlo),
  }


def _empty(folder: pathlib.Path) -> None:
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir()


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
