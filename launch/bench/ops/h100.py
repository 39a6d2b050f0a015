"""What ptxas says of the Mosaic GPU kernels, compiled for an H100 without one.

The part of `launch.bench.kernels` for --target=h100: registers of a thread,
bytes spilled, and shared memory of a block, for the kernels of forward pass,
column sums and both gradients under masks from simple to everything at once;
and for the other ops, see `memory_h100`.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import masks
from kernels_pallas.aot import jobs as jobs_lib
from kernels_pallas.aot import ptx
from kernels_pallas.aot import topology
from kernels_pallas.attention import api
from kernels_pallas.attention import shapes
from launch.bench.ops import memory_h100
from launch.bench.ops import programs

_LENGTH = 2048
# Variant, head size, query heads of a key head.
CASES = (
    ("causal", 64, 1),
    ("causal", 128, 1),
    ("causal", 128, 8),
    ("all options", 64, 8),
    ("all options", 128, 8),
    ("selection", 128, 4),
)
_COLUMNS = (
    ("kernel", "kernel"),
    ("variant", "mask"),
    ("head_dim", "H"),
    ("group", "G"),
    ("registers", "registers"),
    ("spilled_bytes", "bytes spilled"),
    ("smem_kib", "shared KiB"),
    ("num_wgmma", "wgmma"),
    ("num_tma_loads", "TMA loads"),
    ("note", "note"),
)


def gradients(variant: str, head_dim: int, group: int) -> tuple[Any, Any]:
  """A training step that uses all four kernels; see `jobs.Job`."""
  shape = dataclasses.replace(
      shapes.square(_LENGTH, group, 1, head_dim), batch=1
  )
  options: dict[str, Any] = {"return_lse": True, "return_col_mass": True}
  options["implementation"] = "pallas_gpu"
  op: Any = api.attention
  if variant == "selection":
    options["where"] = programs.random_selection(
        _LENGTH, group, 256, 256, density=0.25
    )
  elif variant == "causal":
    options["where"] = masks.causal(_LENGTH)
  else:
    ids = np.arange(_LENGTH) % 7
    near = masks.streaming(_LENGTH, window=300, num_sinks=4)
    options["where"] = masks.hash_sparse(ids, ids) & near
    options["logits_soft_cap"] = 30.0
    options["sink_logits"] = jnp.zeros(group)

  def run(query, key, value):
    def loss(*arrays):
      result = op(*arrays, **options)
      total = result.out.astype(jnp.float32).sum() + result.lse.sum()
      return total, result.col_mass

    return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(query, key, value)

  return run, shape.arrays(jnp.bfloat16)


def measure(
    cases: Sequence[tuple[str, int, int]] = CASES, num_workers: int = 2
) -> list[dict[str, Any]]:
  """Compiles the cases; a row for each kernel.

  Raises:
    ToolchainMissing: If the CUDA plugin or ptxas is not there.
  """
  ptx.require()
  jobs = [
      jobs_lib.Job(
          "h100",
          "launch.bench.ops.h100:gradients",
          {"variant": variant, "head_dim": head_dim, "group": group},
      )
      for variant, head_dim, group in cases
  ]
  rows = []
  for job, result in zip(jobs, jobs_lib.run(jobs, num_workers), strict=True):
    if "missing" in result:
      raise topology.ToolchainMissing(result["missing"])
    if "error" in result:
      note = result["error"].splitlines()[0][:160]
      rows.append({"kernel": "", **job.kwargs, "note": note})
      continue
    for kernel in ptx.from_result(job, result).kernels:
      rows.append({
          "kernel": kernel.name,
          **job.kwargs,
          "registers": kernel.registers,
          "spilled_bytes": kernel.spill_store_bytes,
          "smem_kib": round(kernel.smem_bytes / 2**10, 1),
          "num_wgmma": kernel.num_wgmma,
          "num_tma_loads": kernel.num_tma_loads,
          "note": "",
      })
  return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
  """Formats rows as a Markdown table."""
  lines = [
      f"| {' | '.join(title for _, title in _COLUMNS)} |",
      f"|{' --- |' * len(_COLUMNS)}",
  ]
  for row in rows:
    cells = (str(row.get(name, "")) for name, _ in _COLUMNS)
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def report(
    ops: Sequence[str] = ("attention", "decode", "mlp"),
) -> list[dict[str, Any]]:
  """Prints what `measure` and `memory_h100` find; returns the rows.

  Args:
    ops: Which; linear attention goes with attention.
  """
  print(f"h100, jax {jax.__version__}: compiled, not run; bfloat16.\n")
  rows = measure() if "attention" in ops else []
  if rows:
    print(table(rows), end="\n\n")
  cases = [case for case in memory_h100.cases() if case.op in ops]
  others = memory_h100.measure(cases)
  print(memory_h100.table(others))
  if "attention" in ops:
    slope = memory_h100.slope(cases)
    print(f"\nlinear attention's roofline grows as T^{slope:.2f}")
  rows += others
  spilling = [row for row in rows if row.get("spilled_bytes")]
  print(f"\n{len(spilling)} of {len(rows)} kernels spill registers")
  return rows
