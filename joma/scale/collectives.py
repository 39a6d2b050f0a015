"""What devices send each other in a compiled program, by kind and mesh axis.

Of an array of b bytes in groups of n devices each device sends, in a ring,

  all-gather        b (n - 1) / n      b what is gathered
  reduce-scatter    b (n - 1) / n      b what is summed
  all-reduce        2 b (n - 1) / n    the two, one after the other
  all-to-all        b (n - 1) / n
  permute           b

(R. Thakur, R. Rabenseifner and W. Gropp, Optimization of collective
communication operations in MPICH, 2005). XLA's TPU compiler writes a
reduce-scatter as an all-reduce of which a fusion keeps a part, and an
asynchronous one several times, with one and the same channel. Permutes, which
it writes once each, all have the same channel. Between slices a device hands to
the network, by a `send` whose attributes say what for, its part of what each
slice has summed or gathered by itself.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import re
from typing import Literal

import numpy as np

from joma.scale import program as program_lib

Kind = Literal[
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "permute"
]
_KINDS: dict[str, Kind] = {
    "all-gather": "all-gather",
    "all-reduce": "all-reduce",
    "reduce-scatter": "reduce-scatter",
    "all-to-all": "all-to-all",
    "ragged-all-to-all": "all-to-all",
    "collective-permute": "permute",
}
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"mesh\[([^\]]*)\](?:, device_ids=\((.*?)\) | )\{([^}]*)\}")
# Slices, from 1, and the devices of each that exchange, both ends included.
_NETWORK = re.compile(
    r'_xla_megascale_target="\{([\d,]+)\}x\{(\d+):(\d+)\}".*?'
    r'_xla_megascale_transfer_type="(\w+)"'
)
_LISTS = re.compile(r"\{((?:\{[\d,]*\},?)*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
  """One exchange of a program.

  Attributes:
    kind: Which.
    num_bytes: Of what is gathered, summed or sent, on a device.
    groups: Device numbers [G, n] that exchange; pairs of a permute.
    times: How often it runs.
    name: Its instruction.
  """

  kind: Kind
  num_bytes: int
  groups: tuple[tuple[int, ...], ...]
  times: int
  name: str

  @property
  def group_size(self) -> int:
    """n, devices that exchange among themselves."""
    return len(self.groups[0])

  @property
  def sent_bytes(self) -> float:
    """What a device sends in all its runs, at least."""
    if self.kind == "permute":
      moves = any(source != target for source, target in self.groups)
      return float(self.times * self.num_bytes * moves)
    share = (self.group_size - 1) / self.group_size
    passes = 2 if self.kind == "all-reduce" else 1
    return self.times * passes * share * self.num_bytes

  def axes(self, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Axes of the mesh, in its order, along which its groups reach.

    Args:
      mesh: Sizes of the axes; device numbers go through the last one first.
    """
    ids = np.array(self.groups)
    places = np.unravel_index(ids, tuple(mesh.values()))
    differs = [(place != place[:, :1]).any() for place in places]
    return tuple(name for name, does in zip(mesh, differs, strict=True) if does)


def find(
    program: program_lib.Program, num_devices: int
) -> tuple[Collective, ...]:
  """Lists the exchanges of a program between two or more devices.

  Args:
    program: Compiled for all devices as one (SPMD).
    num_devices: Of the mesh.
  """
  found: dict[str, Collective] = {}
  for run in program_lib.runs(program)[0]:
    inner = _inside(program, run.instruction)
    scatters = _scatters(run.instruction)
    for one in [run.instruction, *inner]:
      if one.opcode == "send" and "megascale" in one.attributes:
        made = _between_slices(one, run.times)
        found.setdefault(one.name, made)
        continue
      kind = _KINDS.get(one.opcode.removesuffix("-start"))
      if kind is None:
        continue
      kind = "reduce-scatter" if scatters and kind == "all-reduce" else kind
      channel = re.search(r"channel_id=(\d+)", one.attributes)
      is_once = kind == "permute" or channel is None
      key = one.name if is_once else channel[1]
      made = _collective(one, kind, run.times, num_devices)
      if key not in found and made.group_size > 1:
        found[key] = made
  return tuple(found.values())


def _scatters(instruction: program_lib.Instruction) -> bool:
  """Whether each device keeps its part alone of what a fusion sums."""
  called = instruction.called("calls") or ""
  return called.startswith("all-reduce-scatter")


def _inside(
    program: program_lib.Program, instruction: program_lib.Instruction
) -> list[program_lib.Instruction]:
  """Instructions of a fusion, and of fusions in it."""
  if instruction.opcode != "fusion":
    return []
  called = program.computations.get(instruction.called("calls") or "", {})
  found = list(called.values())
  for one in called.values():
    found += _inside(program, one)
  return found


def _collective(
    one: program_lib.Instruction, kind: Kind, times: int, num_devices: int
) -> Collective:
  arrays = list(one.arrays)
  if one.opcode.endswith("-start"):
    # (operands, results, contexts) of a gather and a permute; an all-reduce
    # returns results alone.
    if kind != "all-reduce":
      arrays = [array for array in arrays if array.dims]
      arrays = arrays[len(arrays) // 2 :]
  num_bytes = sum(array.num_bytes for array in arrays)
  groups = groups_of(one.attributes, num_devices)
  if one.opcode.startswith("reduce-scatter"):
    num_bytes *= len(groups[0])  # Its result is a part of what it sums.
  return Collective(kind, num_bytes, groups, times, one.name)


def _between_slices(one: program_lib.Instruction, times: int) -> Collective:
  """What devices of the same place in each slice exchange.

  Raises:
    ValueError: The attributes have another form.
  """
  found = _NETWORK.search(one.attributes)
  if found is None:
    raise ValueError(f"unknown exchange of slices: {one.attributes[:200]}")
  slices = [number - 1 for number in _numbers(found[1])]
  first, last = int(found[2]), int(found[3])
  per_slice = last + 1
  groups = tuple(
      tuple(slice_ * per_slice + place for slice_ in slices)
      for place in range(first, per_slice)
  )
  kind = _KINDS.get(found[4].lower().replace("_", "-"), "permute")
  num_bytes = one.arrays[0].num_bytes
  if kind == "all-gather":  # What is handed over is a part of it.
    num_bytes *= len(slices)
  return Collective(kind, num_bytes, groups, times, one.name)


def groups_of(attributes: str, num_devices: int) -> tuple[tuple[int, ...], ...]:
  """Reads which devices exchange, in each of the forms that XLA writes.

  Args:
    attributes: Of the instruction, with replica_groups or source_target_pairs.
    num_devices: All of them, where no group is named.

  Raises:
    ValueError: The form is another one.
  """
  found = re.search(r"(?:replica_groups|source_target_pairs)=(.*)", attributes)
  text = found[1] if found else "{}"
  if match := _MESH.match(text):
    return _of_mesh(*match.groups())
  if match := _IOTA.match(text):
    shape = _numbers(match[1])
    return _rows(_iota(match[2], match[3]).reshape(shape))
  if match := _LISTS.match(text):
    lists = re.findall(r"\{([\d,]+)\}", match[1])
    rows = tuple(_numbers(row) for row in lists)
    return rows or (tuple(range(num_devices)),)
  raise ValueError(f"unknown groups of devices: {text[:80]}")


def _of_mesh(
    sizes: str, device_ids: str | None, names: str
) -> tuple[tuple[int, ...], ...]:
  """Groups along some axes of a mesh that the compiler made for itself."""
  pairs = re.findall(r"'([^']*)'=(\d+)", sizes)
  shape = tuple(int(size) for _, size in pairs)
  ids = np.arange(math.prod(shape))
  iota = device_ids and re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", device_ids)
  if iota:
    ids = _iota(iota[1], iota[2])
  elif device_ids:
    ids = np.array(_numbers(device_ids))
  grid = ids.reshape(shape)
  along = re.findall(r"'([^']*)'", names)
  inner = [i for i, (name, _) in enumerate(pairs) if name in along]
  outer = [i for i in range(len(pairs)) if i not in inner]
  size = math.prod(shape[i] for i in inner)
  return _rows(grid.transpose(*outer, *inner).reshape(-1, size))


def _iota(dims: str, order: str | None) -> np.ndarray:
  shape = _numbers(dims)
  ids = np.arange(math.prod(shape)).reshape(shape)
  return ids.transpose(_numbers(order)) if order else ids


def _rows(ids: np.ndarray) -> tuple[tuple[int, ...], ...]:
  return tuple(tuple(map(int, row)) for row in ids)


def _numbers(text: str | Sequence[str]) -> tuple[int, ...]:
  parts = text.split(",") if isinstance(text, str) else text
  return tuple(int(part) for part in parts if part)
