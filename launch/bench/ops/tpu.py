"""Static schedules of the attention kernels on a TPU that is not there.

The part of `launch.bench.kernels` for --target=tpu:CHIP. A figure of bundles is
what a core issues from a kernel's start to its end: the compiler's schedule,
its branches and loops followed with the tables that the program passes
(`kernels_pallas.aot.control`). Nothing is measured.
"""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import functools
import importlib.metadata
import itertools
from typing import Any

import jax

from kernels_pallas import masks
from kernels_pallas.aot import chips
from kernels_pallas.aot import jobs as jobs_lib
from kernels_pallas.aot import schedule
from kernels_pallas.aot import topology
from kernels_pallas.attention import cost
from kernels_pallas.attention import shapes
from kernels_pallas.linear_attention import cost as linear_cost
from kernels_pallas.linear_attention import shapes as linear_shapes
from launch.bench import markdown
from launch.bench.ops import decode_tpu
from launch.bench.ops import mlp_tpu
from launch.bench.ops import programs

PROGRAMS = "launch.bench.ops.programs:"
# Tiles of a selection, and the two densities through which the line goes.
SPARSE_TILES = ((128, 128), (128, 256), (256, 512), (512, 512), (512, 1024))
DENSITIES = (0.1, 0.3)
# Where linear attention and our dense forward pass are close.
OPS = ("attention", "mlp", "decode")
LINEAR_LENGTHS = (256, 512, 1024)
CALIBRATION = (
    "Static, not measured: stalls on HBM and transposes around the kernels are"
    " left out. On a v6e, timings that others published of splash attention are"
    " 0.94 to 1.18 times such figures at 16,384 positions, and more at shorter"
    " lengths (1.03 to 1.13 at 4,096, up to 2.2 at 2,048); no other chip is"
    " calibrated."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """A program to compile, and what it is for.

  Attributes:
    kernel: Name of the row.
    length: T and S.
    program: Function of `launch.bench.ops.programs`.
    options: Its arguments.
    work: What has to be computed and moved, of all heads.
    last: How many kernels count, from the last of the program on; 0 is all.
  """

  kernel: str
  length: int
  program: str
  options: dict[str, Any]
  work: cost.Cost
  last: int = 0


def measure(
    chip: chips.Chip,
    lengths: Sequence[int],
    sparse_length: int = 32_768,
    sparse_tiles: Sequence[tuple[int, int]] = SPARSE_TILES,
    linear_lengths: Sequence[int] = (),
    num_workers: int = 2,
) -> list[dict[str, Any]]:
  """Compiles every case; a row of figures for each.

  Args:
    chip: What for.
    lengths: T of dense attention.
    sparse_length: T of block-sparse attention, 0 for none.
    sparse_tiles: Queries and keys of its blocks.
    linear_lengths: T of linear attention, with and without a dense forward.
    num_workers: Compilers to run side by side.

  Raises:
    ToolchainMissing: If the compiler is not installed.
  """
  num_heads = chip.num_cores
  cases = [x for n in lengths for x in dense_cases(n, num_heads)]
  for n in linear_lengths:
    cases += linear_cases(n, chip)[n in lengths :]  # The dense one is there.
  if sparse_length:
    cases += sparse_cases(sparse_length, num_heads, sparse_tiles)
  jobs = [
      jobs_lib.Job(chip.name, PROGRAMS + case.program, case.options)
      for case in cases
  ]
  results = jobs_lib.run(jobs, num_workers)
  return [
      row_of(chip, *each) for each in zip(cases, jobs, results, strict=True)
  ]


def dense_cases(length: int, num_heads: int) -> list[Case]:
  """Causal attention, by our kernels and by jax's."""
  shape = shapes.square(length, num_heads, num_heads)
  pairs = cost.num_pairs(masks.causal(length), shape)
  both = {"length": length, "num_heads": num_heads}
  case = functools.partial(Case, length=length)
  forward = functools.partial(case, work=cost.forward(shape, pairs))
  backward = functools.partial(case, work=cost.backward(shape, pairs), last=1)
  summed = functools.partial(
      case, work=cost.forward(shape, pairs, return_col_mass=True)
  )
  emits = both | {"return_col_mass": True}
  two_pass = emits | {"col_mass": "two_pass"}
  cases = [
      forward(kernel="forward", program="forward", options=both),
      summed(kernel="forward + col_mass", program="forward", options=emits),
      summed(
          kernel="the same in two passes", program="forward", options=two_pass
      ),
      backward(kernel="backward", program="backward", options=both),
  ]
  for block in (512, 1024):
    options = both | {"block": block}
    cases += [
        forward(kernel=f"jax {name} {block}", program=name, options=options)
        for name in ("flash", "splash")
    ]
    options = options | {"is_backward": True}
    name = f"jax splash fused backward {block}"
    cases.append(backward(kernel=name, program="splash", options=options))
  return cases


def linear_cases(length: int, chip: chips.Chip) -> list[Case]:
  """Linear attention, and our dense causal attention to compare it with."""
  num_heads = chip.num_cores
  sizes = {"length": length, "num_heads": num_heads}
  shape = linear_shapes.Shape(
      **sizes, num_kv_heads=num_heads, head_dim=programs.HEAD_DIM
  )
  dense, *_ = dense_cases(length, num_heads)
  # Twice the side of a matrix unit, as the kernel chooses.
  chunk = min(512 if chip.name in ("v6e", "v7x") else 256, length)
  linear = Case(
      kernel="linear attention",
      length=length,
      program="linear",
      options=sizes,
      work=linear_cost.forward(shape, chunk),
  )
  return [dense, linear]


def sparse_cases(
    length: int, num_heads: int, all_tiles: Iterable[tuple[int, int]]
) -> list[Case]:
  """Block-sparse attention, and dense attention to compare it with."""
  shape = shapes.square(length, num_heads, num_heads)
  pairs = cost.num_pairs(masks.causal(length), shape)
  case = functools.partial(Case, length=length)
  dense = {"length": length, "num_heads": num_heads}
  cases = [
      case(
          kernel="forward",
          program="forward",
          options=dense,
          work=cost.forward(shape, pairs),
      ),
      case(
          kernel="forward, no mask",
          program="forward",
          options=dense | {"is_causal": False},
          work=cost.forward(shape, cost.num_pairs(None, shape)),
      ),
      case(
          kernel="backward",
          program="backward",
          options=dense,
          work=cost.backward(shape, pairs),
          last=1,
      ),
  ]
  for tiles in all_tiles:
    for density in DENSITIES:
      selection = programs.random_selection(length, num_heads, *tiles, density)
      options = dense | dict(
          zip(("block_q", "block_kv"), tiles, strict=True), density=density
      )
      name = _sparse_name(tiles, density)
      listed = cost.num_pairs(selection, shape)
      work = cost.forward(shape, listed)
      cases.append(
          case(kernel=name, program="sparse", options=options, work=work)
      )
      if density == DENSITIES[0] and tiles[1] == 512:
        cases.append(
            case(
                kernel=f"{name} backward",
                program="sparse",
                options=options | {"is_backward": True},
                work=cost.backward(shape, listed),
                last=1,
            )
        )
  return cases


def row_of(
    chip: chips.Chip, case: Case, job: jobs_lib.Job, result: dict[str, Any]
) -> dict[str, Any]:
  """The figures of a case, or a note that says why there are none."""
  work = case.work
  row = {
      "chip": chip.name,
      "shape": _shape_name(case),
      "length": case.length,
      "kernel": case.kernel,
      "gflops": work.flops / 1e9,
      "hbm_mb": work.bytes_accessed / 1e6,
      "roofline_us": (
          1e6 * work.seconds(chip.bf16_flops_per_sec, chip.hbm_bytes_per_sec)
      ),
  }
  if "error" in result:
    return row | {"note": result["error"].splitlines()[0][:160]}
  jobs_lib.check(job, result)
  report = schedule.from_result(job, result)
  kernels = report.kernels[-case.last :]
  bundles = schedule.total(kernel.issued for kernel in kernels)
  steps = schedule.total(kernel.num_steps for kernel in kernels)
  row |= {
      "vmem_mib": max(kernel.vmem_bytes for kernel in kernels) / 2**20,
      "spills": sum(kernel.spills for kernel in kernels),
      "temp_mib": report.temp_bytes / 2**20,
      "steps": steps and steps // chip.num_cores,
  }
  if bundles is None:
    reasons = (kernel.undecided for kernel in kernels)
    return row | {"note": next(filter(None, reasons))}
  return row | {
      "static_bundles": bundles,
      "static_us": 1e6 * schedule.seconds(bundles, chip.name),
      "note": "",
  }


def _sparse_name(tiles: tuple[int, int], density: float) -> str:
  return f"block-sparse {tiles[0]}x{tiles[1]} {density:.0%}"


def _shape_name(case: Case) -> str:
  """As in the shapes of the op, of which a head is taken."""
  names = {
      shape.num_queries: name
      for name, shape in reversed(shapes.BENCHMARKS.items())
      if shape.num_queries == shape.num_keys
      and shape.head_dim == programs.HEAD_DIM
  }
  names |= {4096: "mha_4k", 16_384: "mha_16k"}
  return names.get(case.length, f"T={case.length}")


_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "shape": ("shape", str),
    "kernel": ("kernel", str),
    "gflops": ("GFLOP", "{:.1f}".format),
    "hbm_mb": ("HBM MB", "{:.1f}".format),
    "roofline_us": ("roofline us", "{:.1f}".format),
    "vmem_mib": ("VMEM MiB", "{:.1f}".format),
    "spills": ("spills", str),
    "steps": ("grid steps", "{:,}".format),
    "per_step": ("bundles a step", "{:,.0f}".format),
    "static_bundles": ("bundles", "{:,}".format),
    "static_us": ("static us", "{:.1f}".format),
    "note": ("note", str),
}


def table(rows: Sequence[dict[str, Any]]) -> str:
  """Formats rows as a Markdown table."""
  per_step = lambda row: (
      {"per_step": row["static_bundles"] / row["steps"]}
      if row.get("static_bundles") and row.get("steps")
      else {}
  )
  return markdown.table(_COLUMNS, [row | per_step(row) for row in rows])


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
  """Compares kernels with each other and with jax's: a sentence each."""
  sentences = []
  for length in dict.fromkeys(row["length"] for row in rows):
    found = {
        row["kernel"]: row["static_bundles"]
        for row in rows
        if row["length"] == length and row.get("static_bundles")
    }
    sentences += _of_dense(length, found) + _of_sparse(length, found)
  return sentences + _of_linear(rows)


def _of_dense(length: int, found: dict[str, int]) -> list[str]:
  peers = {name: n for name, n in found.items() if name.startswith("jax")}
  is_backward = {name: "backward" in name for name in peers}
  best = lambda kind: min(
      (n for name, n in peers.items() if is_backward[name] is kind),
      default=None,
  )
  pairs = (
      ("forward", "the best of jax's", best(False)),
      ("forward + col_mass", "our forward", found.get("forward")),
      ("the same in two passes", "our forward", found.get("forward")),
      ("forward + col_mass", "the best of jax's", best(False)),
      ("backward", "jax's best fused backward", best(True)),
  )
  return [
      f"T={length:,}: {name} {found[name] / other:.2f} of {what}"
      for name, what, other in pairs
      if name in found and other
  ]


def _of_sparse(length: int, found: dict[str, int]) -> list[str]:
  """Where block-sparse attention beats our dense causal one."""
  dense = found.get("forward")
  sentences = []
  for tiles in SPARSE_TILES:
    low, high = (found.get(_sparse_name(tiles, d)) for d in DENSITIES)
    if dense and low and high:
      density = break_even(dense, low, high)
      name = f"{tiles[0]}x{tiles[1]}"
      sentences.append(
          f"T={length:,}: blocks of {name} beat dense causal attention below"
          f" {density:.0%} of its blocks; at {DENSITIES[0]:.0%} they take"
          f" {dense / low:.1f}x fewer bundles"
      )
  if "forward, no mask" in found and sentences:
    ratio = found["forward, no mask"] / dense if dense else 0
    sentences.append(
        f"T={length:,}: dense attention without a mask takes {ratio:.2f}x as"
        " many as causal attention"
    )
  return sentences


def _of_linear(rows: Sequence[dict[str, Any]]) -> list[str]:
  """From which length on linear attention takes fewer bundles than dense."""
  found = {
      (row["kernel"], row["length"]): row["static_bundles"]
      for row in rows
      if row.get("static_bundles")
  }
  lengths = sorted(n for name, n in found if name == "linear attention")
  ratios = [
      (n, found["linear attention", n] / found["forward", n])
      for n in lengths
      if ("forward", n) in found
  ]
  sentences = [
      f"T={n:,}: linear attention {ratio:.2f} of our dense forward,"
      f" {found['linear attention', n] / n:.2f} bundles a position"
      for n, ratio in ratios
  ]
  return sentences + ([crossing(ratios)] if ratios else [])


def crossing(ratios: Sequence[tuple[int, float]]) -> str:
  """Where the ratio of linear to dense attention falls to 1.

  Args:
    ratios: Lengths, ascending, and the ratio at each; a line between them.
  """
  what = "linear attention takes fewer bundles than dense"
  if ratios[0][1] < 1:
    return f"{what} at T={ratios[0][0]:,} and above"
  for (low, above), (high, below) in itertools.pairwise(ratios):
    if below < 1:
      length = low + (high - low) * (above - 1) / (above - below)
      return f"{what} from T={length:,.0f} on"
  return f"{what} nowhere up to T={ratios[-1][0]:,}"


def break_even(dense: int, low: int, high: int) -> float:
  """The density at which a line through two densities meets `dense`."""
  slope = (high - low) / (DENSITIES[1] - DENSITIES[0])
  return DENSITIES[0] + (dense - low) / slope


def versions() -> str:
  """What compiled."""
  libtpu = importlib.metadata.version("libtpu")
  return f"jax {jax.__version__}, libtpu {libtpu}"


def report(
    name: str,
    lengths: Sequence[int],
    sparse_length: int,
    ops: Sequence[str] = OPS,
) -> list[dict[str, Any]]:
  """Prints what `measure` finds for the chip of this name; returns the rows.

  Args:
    name: In `chips`.
    lengths: Of attention's programs.
    sparse_length: Of block-sparse ones; 0 is none.
    ops: Which of `OPS`.

  Raises:
    ValueError: If there is no such TPU.
    ToolchainMissing: If the compiler is not installed.
  """
  chip = chips.get_chip(name)
  if chip.platform != "tpu":
    raise ValueError(f"no TPU {name!r}; known are {', '.join(chips.TPU_NAMES)}")
  topology.require("tpu")
  rows = []
  if "attention" in ops:
    rows += _report_attention(chip, lengths, sparse_length)
  if "mlp" in ops:
    rows += mlp_tpu.report(chip)
  if "decode" in ops:
    rows += decode_tpu.report(chip)
  return rows


def _report_attention(
    chip: chips.Chip, lengths: Sequence[int], sparse_length: int
) -> list[dict[str, Any]]:
  linear_lengths = sorted({*LINEAR_LENGTHS, *lengths})
  rows = measure(chip, lengths, sparse_length, linear_lengths=linear_lengths)
  print(
      f"{chip.name}, {versions()}; {chip.num_cores} causal head(s) of"
      f" {programs.HEAD_DIM}, one a core, bfloat16. {CALIBRATION}\n"
  )
  print(table(rows) + "\n")
  print("\n".join(summary(rows)))
  return rows
