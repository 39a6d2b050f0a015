"""Compiles the attention kernels for a TPU that is not there and compares them.

  python -m launch.bench_kernels --target=tpu:v5e --output=kernels.json

prints, of one causal head (head size 128, bfloat16), cycles of the whole kernel
as the compiler schedules it, FLOPs, roofline time, VMEM, spills and bytes that
the program allocates, for our kernels and for jax's flash and splash attention
compiled in the same run. Cycles are static, not measured: they know no stalls
on HBM. On a v6e, timings that others published of jax-like kernels are .94 to
1.18 times such figures at 16,384 positions.

Targets: tpu:v4, tpu:v5e, tpu:v5p, tpu:v6e, tpu:v7x. Needs the extra `tpu`.
"""

import json
from typing import Any

from absl import flags

from kernels_pallas import masks
from kernels_pallas.aot import chips
from kernels_pallas.aot import jobs
from kernels_pallas.aot import schedule
from kernels_pallas.aot import topology
from kernels_pallas.flash_attention import cost
from kernels_pallas.flash_attention import shapes
from launch import app
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import workdir

# Whoever imports this module for its functions gets no flags.
_FLAGS = flags.FLAGS if __name__ == "__main__" else flags.FlagValues()
_TARGET = flags.DEFINE_string(
    "target", "tpu:v5e", "What to compile for, as tpu:CHIP.", flag_values=_FLAGS
)
_LENGTHS = flags.DEFINE_list(
    "lengths", ["4096"], "Sequence lengths, multiples of 1024.", _FLAGS
)
_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write.", _FLAGS)

_OURS = (
    ("forward", "forward", {"block": 1024}),
    ("forward + col_mass", "forward", {"block": 1024, "return_col_mass": True}),
    ("forward + backward", "backward", {"block": 1024}),
)
_PEERS = tuple(
    (f"jax {name}{' fused backward' if extra else ''} {block}", name, case)
    for block in (512, 1024)
    for name, extra in (
        ("flash", {}),
        ("splash", {}),
        ("splash", {"is_backward": True}),
    )
    for case in [{"block": block, **extra}]
)


def main(_: list[str]) -> None:
  """Measures, prints, writes."""
  rows = measure(_TARGET.value, [_length(text) for text in _LENGTHS.value])
  for row in rows:
    print(" ".join(f"{name}={_show(value)}" for name, value in row.items()))
  if _OUTPUT.value:
    workdir.write_atomic(_OUTPUT.value, json.dumps(rows, indent=2) + "\n")


def measure(target: str, lengths: list[int]) -> list[dict[str, Any]]:
  """Compiles every case; a row of figures for each kernel.

  Raises:
    UserError: If the target is unknown or its compiler is not installed.
  """
  platform, _, name = target.partition(":")
  if platform != "tpu":
    raise errors.UserError(f"--target={target} must be tpu:CHIP")
  try:
    chip = chips.get_chip(name)
    kinds: Any = (*_OURS, *_PEERS)
    cases = [(length, *case) for length in lengths for case in kinds]
    reports = schedule.report([
        jobs.Job(
            chip.name,
            f"launch.kernel_programs:{program}",
            {"length": length, **kwargs},
        )
        for length, _, program, kwargs in cases
    ])
  except (ValueError, topology.ToolchainMissing) as error:
    raise errors.UserError(str(error)) from error
  return [
      _row(chip, length, label, kwargs["block"], report, kernel)
      for (length, label, _, kwargs), report in zip(cases, reports, strict=True)
      # The backward is the last kernel of its program.
      for kernel in report.kernels[-1:]
  ]


def _row(chip, length, label, block, report, kernel) -> dict[str, Any]:
  is_backward = "backward" in label
  if label == "forward + backward":
    block = min(block, 512)  # `tpu_config.backward_tiles`.
  bundles = schedule.estimate(kernel, runs(kernel.tree, label, length // block))
  shape = shapes.square(length, 1, 1)
  pairs = cost.num_pairs(masks.causal(length), shape)
  work = (cost.backward if is_backward else cost.forward)(shape, pairs)
  return {
      "chip": chip.name,
      "length": length,
      "kernel": label,
      "static_bundles": bundles,
      "static_us": 1e6 * schedule.seconds(bundles, chip.name),
      "roofline_us": (
          1e6 * work.seconds(chip.bf16_flops_per_sec, chip.hbm_bytes_per_sec)
      ),
      "gflops": work.flops / 1e9,
      "hbm_mb": work.bytes_accessed / 1e6,
      "vmem_mib": kernel.vmem_bytes / 2**20,
      "spills": kernel.spills,
      "temp_mib": report.temp_bytes / 2**20,
  }


def runs(tree: Any, label: str, num_tiles: int) -> list[int]:
  """How often each region of a causal kernel runs; see `schedule.estimate`.

  Args:
    tree: Of the kernel.
    label: Of the case.
    num_tiles: Tiles a side.
  """
  full, partial = num_tiles * (num_tiles - 1) // 2, num_tiles
  if label.startswith("jax"):
    return _runs_of_peer(tree, num_tiles, full + partial)
  # Loops inside the loop over rows or columns of tiles, in order.
  loops = iter(
      {
          "forward": (full, partial, full + partial),
          "forward + col_mass": (
              *(full, partial, full + partial),
              *(0, num_tiles, num_tiles),
          ),
          "forward + backward": (full, partial, num_tiles),
      }[label]
  )
  _, grid, *inner = tree.walk()
  assert grid.kind == "loop", grid
  return [num_tiles] + [
      next(loops) if region.kind == "loop" else num_tiles for region in inner
  ]


def _runs_of_peer(tree: Any, num_tiles: int, num_visited: int) -> list[int]:
  """Every tile is a step; its longest branch runs where it is visited."""
  _, *regions = tree.walk()
  body = max(region.bundles for region in regions)
  ends = {id(regions[2]), id(regions[-1])}  # Begin and end of a row.
  found = []
  for region in regions:
    if region.bundles == body:
      found.append(num_visited)
    else:
      found.append(num_tiles if id(region) in ends else num_tiles**2)
  return found


def _length(text: str) -> int:
  if not text.isdigit() or int(text) < 1024 or int(text) % 1024:
    raise errors.UserError(f"--lengths={text} must be a multiple of 1024")
  return int(text)


def _show(value: Any) -> str:
  if isinstance(value, float):
    return f"{value:.4g}"
  return repr(value) if isinstance(value, str) and " " in value else str(value)


if __name__ == "__main__":
  app.run(main)
