"""What ptxas says of decode, gathered MLP and linear attention on an H100.

The part of `launch.bench.ops.h100` for what is bound by memory. Beside
registers and spills stands the roofline, the longer of needed operations and
needed bytes at the chip's peaks, and what it is of the peer's: a step over
32,768 slots, the dense MLP, linear attention of a quarter of the length.
Nothing is measured: what a kernel takes beyond its roofline, only a GPU shows.
"""

from collections.abc import Sequence
import dataclasses
import math
import re
from typing import Any

from kernels_pallas.aot import chips
from kernels_pallas.aot import jobs as jobs_lib
from kernels_pallas.aot import ptx
from kernels_pallas.aot import topology
from kernels_pallas.decode import cost as decode_cost
from kernels_pallas.gather_mlp import cost as gather_cost
from kernels_pallas.gather_mlp import shapes as gather_shapes
from kernels_pallas.linear_attention import cost as linear_cost
from launch.bench.ops import gpu_programs

_PROGRAMS = "launch.bench.ops.gpu_programs:"
# Positions of a chunk, for the count of operations.
_CHUNK = 64
_COLUMNS = {
    "kernel": "kernel",
    "case": "of",
    "registers": "registers",
    "spilled_bytes": "bytes spilled",
    "smem_kib": "shared KiB",
    "num_wgmma": "wgmma",
    "num_tma_loads": "TMA loads",
    "temp_mib": "temporary MiB",
    "roofline_us": "roofline us",
    "of_peer": "of peer's",
    "note": "note",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """One program.

  Attributes:
    name: What it is.
    op: "decode", "mlp" or "attention".
    program: A function of `gpu_programs`.
    kwargs: Its arguments.
    roofline_us: Of the program.
    of_peer: That by the peer's; None without one.
  """

  name: str
  op: str
  program: str
  kwargs: dict[str, Any]
  roofline_us: float
  of_peer: float | None = None

  @property
  def job(self) -> jobs_lib.Job:
    """The compilation."""
    return jobs_lib.Job("h100", _PROGRAMS + self.program, self.kwargs)


def cases(
    *,
    capacities: Sequence[int] = (32_768, 4096),
    mlps: Sequence[str] = ("opt_6.7b_b16", "llama3_8b_b16"),
    density: float = 0.1,
    lengths: Sequence[int] = (4096, 16_384, 65_536),
) -> list[Case]:
  """Decode, MLPs and linear attention.

  Args:
    capacities: Slots; the first are all of them.
    mlps: Names in `gather_mlp.shapes.BENCHMARKS`.
    density: Share of the blocks.
    lengths: T, growing.
  """
  found = []
  full = _roofline(
      decode_cost.step(gpu_programs.decode_shape(1, capacities[0]))
  )
  for capacity in capacities:
    shape = gpu_programs.decode_shape(1, capacity)
    for dtype, itemsize in (("bfloat16", 2), ("int8", 1)):
      us = _roofline(decode_cost.step(shape, cache_itemsize=itemsize))
      kwargs = {"batch": 1, "capacity": capacity, "cache_dtype": dtype}
      name = f"decode C={capacity} {dtype}"
      found.append(_case(name, "decode", "decode", kwargs, us, us / full))
  for name in mlps:
    shape = gather_shapes.BENCHMARKS[name]
    for count, is_backward in (
        (gather_cost.forward, False),
        (gather_cost.backward, True),
    ):
      us = _roofline(count(shape, gpu_programs.num_chosen(name, density)))
      dense = _roofline(count(shape, shape.num_blocks))
      kwargs = {"shape": name, "density": density, "is_backward": is_backward}
      what = f"{name} at {density:.0%}" + (" gradients" if is_backward else "")
      found.append(_case(what, "mlp", "gather_mlp", kwargs, us, us / dense))
  before = None
  for length in lengths:
    shape = gpu_programs.linear_shape(length)
    us = _roofline(linear_cost.forward(shape, _CHUNK))
    name, kwargs = f"linear T={length}", {"length": length}
    of_peer = None if before is None else us / before
    found.append(_case(name, "attention", "linear", kwargs, us, of_peer))
    before = us
  return found


def measure(
    chosen: Sequence[Case], num_workers: int = 2
) -> list[dict[str, Any]]:
  """Compiles the cases; a row for each kernel.

  Raises:
    ToolchainMissing: If the CUDA plugin or ptxas is not there.
  """
  ptx.require()
  jobs = [case.job for case in chosen]
  results = jobs_lib.run(jobs, num_workers)
  rows = []
  for case, result in zip(chosen, results, strict=True):
    rows += rows_of(case, result)
  return rows


def rows_of(case: Case, result: dict[str, Any]) -> list[dict[str, Any]]:
  """The rows of a compilation.

  Raises:
    ToolchainMissing: If the compiler is.
  """
  row = {"case": case.name, "of_peer": case.of_peer, "note": ""}
  row["roofline_us"] = case.roofline_us
  if "missing" in result:
    raise topology.ToolchainMissing(result["missing"])
  if "error" in result:
    return [row | {"kernel": "", "note": result["error"].splitlines()[0][:160]}]
  report = ptx.from_result(case.job, result)
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


def slope(chosen: Sequence[Case]) -> float:
  """Of log roofline over log T, of linear attention's first and last length."""
  known = [x for x in chosen if x.program == "linear"]
  first, last = known[0], known[-1]
  lengths = last.kwargs["length"] / first.kwargs["length"]
  return math.log(last.roofline_us / first.roofline_us) / math.log(lengths)


def table(rows: Sequence[dict[str, Any]]) -> str:
  """Formats rows as a Markdown table."""

  def text(value):
    return f"{value:.3g}" if isinstance(value, float) else str(value)

  lines = [
      f"| {' | '.join(_COLUMNS.values())} |",
      f"|{' --- |' * len(_COLUMNS)}",
  ]
  for row in rows:
    values = (row.get(name) for name in _COLUMNS)
    cells = ("" if value is None else text(value) for value in values)
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def _case(*fields: Any) -> Case:
  names = (field.name for field in dataclasses.fields(Case))
  return Case(**dict(zip(names, fields, strict=True)))


def _roofline(work: Any) -> float:
  """Microseconds."""
  chip = chips.get_chip("h100")
  seconds = max(
      work.flops / chip.bf16_flops_per_sec,
      work.bytes_accessed / chip.hbm_bytes_per_sec,
  )
  return 1e6 * seconds
