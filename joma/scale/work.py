"""FLOPs and HBM bytes of a compiled program, loops as often as they run.

XLA's own account counts the body of a loop once. FLOPs are those of matrix
products, which XLA's TPU compiler writes as convolutions, and what Pallas
kernels declare. Bytes are those of what each instruction reads and writes in
main memory, every array once: slices by their own size, arrays that the
compiler keeps in VMEM not at all, and of Pallas kernels operands and results.
"""

import dataclasses
import json
import math
import re

from joma.scale import program as program_lib

# They move nothing: names for what is there, or ends of what had a start.
_FREE = frozenset({
    "after-all",
    "bitcast",
    "call",
    "conditional",
    "constant",
    "get-tuple-element",
    "iota",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
    "while",
})
_SLICES = ("dynamic-slice", "slice", "gather")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_GPU_KERNEL = re.compile(
    r'custom_call_target="(mosaic_gpu|__gpu\$xla\.gpu\.triton)'
)
_WINDOW = re.compile(r"window=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Work:
  """Of one device.

  Attributes:
    flops: Of matrix products and of what Pallas kernels declare.
    kernel_flops: Of the latter.
    hbm_bytes: Read and written.
    unknown_loops: Loops that are counted once, for nothing says how often they
      run.
    silent_kernels: Places of Pallas kernels for GPUs, which declare no FLOPs.
  """

  flops: int
  kernel_flops: int
  hbm_bytes: int
  unknown_loops: tuple[str, ...] = ()
  silent_kernels: int = 0


def count(program: program_lib.Program) -> Work:
  """Counts what a program does."""
  runs, unknown = program_lib.runs(program)
  flops = kernels = moved = silent = 0
  for run in runs:
    silent += _GPU_KERNEL.search(run.instruction.attributes) is not None
    declared = run.times * _declared(run.instruction)
    kernels += declared
    flops += declared + run.times * _flops(
        program, run.instruction, run.computation
    )
    moved += run.times * _moved(program, run)
  return Work(flops, kernels, moved, tuple(unknown), silent)


def _declared(one: program_lib.Instruction) -> int:
  """FLOPs of a Pallas kernel, by its `pl.CostEstimate`."""
  if one.opcode != "custom-call":
    return 0
  found = re.search(r'"cost_estimate":(\{[^}]*\})', one.attributes)
  return int(json.loads(found[1]).get("flops", 0)) if found else 0


def _flops(
    program: program_lib.Program,
    one: program_lib.Instruction,
    computation: program_lib.Computation,
) -> int:
  """Of an instruction's matrix products, those in fusions included."""
  if one.opcode == "fusion":
    inner = program.computations.get(one.called("calls") or "", {})
    return sum(_flops(program, each, inner) for each in inner.values())
  if one.opcode == "dot":
    left = computation[one.operands[0]].arrays[0].dims
    axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)
    over = [left[int(axis)] for axis in axes[1].split(",")] if axes else []
    return 2 * math.prod(one.arrays[0].dims) * math.prod(over)
  if one.opcode == "convolution":
    return _convolution_flops(one, computation)
  return 0


def _convolution_flops(
    one: program_lib.Instruction, computation: program_lib.Computation
) -> int:
  """Products that are no padding: an axis of the batch is a window's, too."""
  labels = _LABELS.search(one.attributes)
  if labels is None:
    return 0
  left = computation[one.operands[0]].arrays[0].dims
  right = computation[one.operands[1]].arrays[0].dims
  out = dict(zip(labels[3], one.arrays[0].dims, strict=True))
  kernel = dict(zip(labels[2], right, strict=True))
  image = dict(zip(labels[1], left, strict=True))
  total = 2 * out["b"] * out["f"] * kernel["i"]
  spatial = sorted(label for label in out if label.isdigit())
  window = _WINDOW.search(one.attributes)
  fields = dict(
      part.split("=", 1) for part in (window[1].split() if window else ())
  )
  for place, label in enumerate(spatial):
    total *= _positions(fields, place, image[label], out[label])
  return total


def _positions(
    fields: dict[str, str], place: int, size: int, out_size: int
) -> int:
  """Pairs of output and window positions that meet an entry of the image."""
  of = lambda name, default: (
      fields[name].split("x")[place] if name in fields else default
  )
  width, stride = int(of("size", "1")), int(of("stride", "1"))
  dilate, spread = int(of("lhs_dilate", "1")), int(of("rhs_dilate", "1"))
  low = int(of("pad", "0_0").split("_")[0])
  met = 0
  for step in range(width):
    for start in range(out_size):
      at = start * stride + step * spread - low
      met += 0 <= at and at % dilate == 0 and at // dilate < size
  return met


def _moved(program: program_lib.Program, run: program_lib.Run) -> int:
  """HBM bytes of an instruction."""
  one = run.instruction
  # What an end returns was counted at its start.
  if one.opcode in _FREE or one.opcode.endswith("-done"):
    return 0
  of = lambda name: _in_hbm(run.computation[name].arrays)
  known = [name for name in one.operands if name in run.computation]
  if one.opcode == "fusion":
    inner = program.computations.get(one.called("calls") or "", {})
    return _fusion_bytes(one, inner, [of(name) for name in known])
  if one.opcode in _SLICES:
    return 2 * _in_hbm(one.arrays)
  if one.opcode == "dynamic-update-slice":
    return 2 * of(one.operands[1])
  if one.opcode in ("copy-start", "slice-start"):
    # It names source, destination and contexts; what arrives is what moves.
    arrived = one.arrays[0]
    if one.opcode == "slice-start":
      arrived = [array for array in one.arrays if array.dims][-1]
    return arrived.num_bytes * (1 + arrived.is_in_hbm)
  return _in_hbm(one.arrays) + sum(of(name) for name in known)


def _in_hbm(arrays: tuple[program_lib.Array, ...]) -> int:
  return sum(array.num_bytes for array in arrays if array.is_in_hbm)


def _fusion_bytes(
    one: program_lib.Instruction,
    inner: program_lib.Computation,
    operands: list[int],
) -> int:
  """Bytes of a fusion: of what it slices and writes into, those parts."""
  parameters = {
      each.name: int(each.arguments)
      for each in inner.values()
      if each.opcode == "parameter"
  }
  read = dict(enumerate(operands))
  written = _in_hbm(one.arrays)
  for name, place in parameters.items():
    users = [each for each in inner.values() if name in each.operands]
    if place not in read or not read[place] or not users:
      continue
    if all(each.opcode in _SLICES for each in users):
      parts = sum(_all_bytes(each) for each in users)
      read[place] = min(read[place], parts)
    elif all(
        each.opcode == "dynamic-update-slice" and each.operands[0] == name
        for each in users
    ):
      part = sum(_all_bytes(inner[each.operands[1]]) for each in users)
      whole = read[place]
      read[place] = 0
      # The array is written in place: its result is that part, too.
      written -= max(0, min(written, whole) - part)
  return written + sum(read.values())


def _all_bytes(one: program_lib.Instruction) -> int:
  return sum(array.num_bytes for array in one.arrays)
