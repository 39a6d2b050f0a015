"""What the text of a compiled program says of copies, kernels and memory."""

import dataclasses
import math
import re

_KERNEL = re.compile(r'custom_call_target="(tpu_custom_call|mosaic_gpu_v2)"')
# An instruction with metadata may be spread over several lines.
_START = re.compile(r"^ *(?:ROOT )?%(\S+) = ", re.MULTILINE)
_COMPUTATION = re.compile(r"(?:ENTRY )?%([\w.\-]+) .*\{$")
_ARRAY = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\]")
_COPY = re.compile(r"(\S+) copy\(%([^ ,)]+)")
_COPY_START = re.compile(r"\((\S+), (\S+), [^=]*? copy-start\(")
_OPERANDS = re.compile(r" custom-call\(([^)]*)\)")
_VMEM = re.compile(
    r'"used_scoped_memory_configs":\[[^\]]*"memory_space":"1"[^\]}]*'
    r'"size":"(\d+)"'
)


@dataclasses.dataclass(frozen=True)
class Copy:
  """A copy of an array from HBM to HBM: its shape with layout, its bytes."""

  shape: str
  num_bytes: int


def array_bytes(shape: str) -> int:
  """Bytes of an array such as bf16[8,128]{1,0:T(8,128)(2,1)}, unpadded."""
  match = _ARRAY.match(shape)
  if match is None:
    return 0
  kind, bits, dims = match.groups()
  num_bits = 8 if kind == "pred" else int(bits or 32)
  return math.prod(int(n) for n in dims.split(",") if n) * num_bits // 8


def copies(hlo: str, min_bytes: int) -> tuple[Copy, ...]:
  """Lists the copies in HBM of at least so many bytes, also inside fusions.

  A transfer between HBM and VMEM, which XLA uses to prefetch, is not listed:
  its shape carries another memory space, S(1).
  """
  found, shapes = [], {}
  for name, text in _instructions(hlo):
    shapes[name] = text.split(" ", 1)[0]
    if match := _COPY.match(text):
      pair = match[1] + shapes.get(match[2], "")
    elif match := _COPY_START.match(text):
      pair = match[1] + match[2]
    else:
      continue
    # Both ends in HBM, and large enough to matter.
    copy = Copy(match[1], array_bytes(match[1]))
    if "S(" not in pair and copy.num_bytes >= min_bytes:
      found.append(copy)
  return tuple(found)


def largest_array(hlo: str) -> int:
  """Bytes of the largest array that is in memory: none that is in a fusion.

  Members of tuples count where they are taken out.
  """
  fused = set(re.findall(r"calls=%([\w.\-]+)", hlo))
  largest, is_fused = 0, False
  for line in hlo.splitlines():
    if match := _COMPUTATION.match(line):
      is_fused = match[1] in fused
    elif not is_fused and (match := _START.match(line)):
      shape = line[match.end() :]
      largest = max(largest, array_bytes(shape))
  return largest


def kernels(hlo: str) -> dict[str, int]:
  """The names of the Pallas kernels in it, with bytes of scoped VMEM."""
  found = {}
  for name, text in _instructions(hlo):
    if " custom-call(" in text and _KERNEL.search(text):
      vmem = _VMEM.search(text)
      found[name] = int(vmem[1]) if vmem else 0
  return found


def kernel_operands(hlo: str) -> dict[str, list[str]]:
  """The shapes, with layouts, of what each Pallas kernel is passed."""
  instructions = _instructions(hlo)
  shapes = {name: text.split(" ", 1)[0] for name, text in instructions}
  found = {}
  for name, text in instructions:
    call = _OPERANDS.search(text)
    if call and _KERNEL.search(text):
      names = re.findall(r"%([^ ,)]+)", call[1])
      found[name] = [shapes[operand] for operand in names]
  return found


def fusion_cycles(hlo: str) -> int:
  """Sum of the cycles that XLA's TPU compiler expects of its own fusions.

  A fusion in the body of a loop counts once.
  """
  return sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', hlo)))


def _instructions(hlo: str) -> list[tuple[str, str]]:
  """Names of instructions, and what follows the equals sign."""
  matches = list(_START.finditer(hlo))
  ends = [match.start() for match in matches[1:]] + [len(hlo)]
  return [(m[1], hlo[m.end() : e]) for m, e in zip(matches, ends, strict=True)]
