"""The text of a compiled program as instructions, and how often each runs.

  %name = shape opcode(%operand, ...), attribute=value, ...

An instruction in the body of a loop runs as often as the loop does: its
condition compares a counter with a number, and its body says by how much the
counter goes up, which is more than one where XLA has unrolled it.
"""

from collections.abc import Iterator
import dataclasses
import functools
import math
import re

_NAME = re.compile(r"%([\w.\-]+)")
_HEAD = re.compile(r"^(?:ENTRY )?%([\w.\-]+) \(.*\{$")
_START = re.compile(r"^ +(?:ROOT )?%([\w.\-]+) = ")
_OPCODE = re.compile(r" ?([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\](\{[^}]*\})?")
_OFF_HBM = re.compile(r"S\(\d+\)")


@dataclasses.dataclass(frozen=True)
class Array:
  """An array of a shape, as the text has it.

  Attributes:
    dims: Its axes.
    num_bytes: Without padding.
    is_in_hbm: Whether it lies in main memory, not in a smaller one.
  """

  dims: tuple[int, ...]
  num_bytes: int
  is_in_hbm: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line.

  Attributes:
    name: Without its percent sign.
    opcode: Such as `all-gather`.
    shape: Text of what it returns.
    operands: Names.
    arguments: Text between the parentheses.
    attributes: Text behind them.
    is_root: Whether the computation returns it.
  """

  name: str
  opcode: str
  shape: str
  operands: tuple[str, ...]
  arguments: str
  attributes: str
  is_root: bool

  @functools.cached_property
  def arrays(self) -> tuple[Array, ...]:
    """The arrays that it returns; several of a tuple."""
    return arrays_of(self.shape)

  def called(self, attribute: str) -> str | None:
    """The computation that an attribute such as `body` names."""
    found = re.search(rf"\b{attribute}=%([\w.\-]+)", self.attributes)
    return found[1] if found else None


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Program:
  """Computations by name, of which one is where the program begins."""

  computations: dict[str, Computation]
  entry: str


@dataclasses.dataclass(frozen=True)
class Run:
  """An instruction, where it stands and how often it runs.

  Attributes:
    instruction: What runs; fusions are one.
    computation: Its neighbours, by name.
    times: How often, in one run of the program.
  """

  instruction: Instruction
  computation: Computation
  times: int


def arrays_of(shape: str) -> tuple[Array, ...]:
  """Reads a shape, as bf16[8,128]{1,0:T(8,128)S(1)}, or a tuple of some."""
  return tuple(map(_array, _ARRAY.finditer(shape)))


def _array(found: re.Match[str]) -> Array:
  kind, bits, dims, layout = found.groups()
  sizes = tuple(int(size) for size in dims.split(",") if size)
  num_bits = 8 if kind == "pred" else int(bits or 32)
  return Array(
      sizes,
      math.prod(sizes) * num_bits // 8,
      not _OFF_HBM.search(layout or ""),
  )


def parse(text: str) -> Program:
  """Reads the text of a compiled program.

  Raises:
    ValueError: It has no entry.
  """
  computations: dict[str, Computation] = {}
  entry, lines = "", []
  current: Computation = {}
  for line in text.splitlines():
    if head := _HEAD.match(line):
      current = computations.setdefault(head[1], {})
      entry = head[1] if line.startswith("ENTRY ") else entry
    elif _START.match(line):
      _add(current, lines)
      lines = [line]
    elif line.startswith("}"):
      _add(current, lines)
      lines = []
    elif lines:  # Metadata may be spread over several lines.
      lines.append(line)
  if not entry:
    raise ValueError("the program has no entry")
  return Program(computations, entry)


def _add(computation: Computation, lines: list[str]) -> None:
  if not lines:
    return
  text = " ".join(lines)
  start = _START.match(text)
  assert start is not None
  shape_end = _close(text, start.end()) if text[start.end()] == "(" else None
  if shape_end is None:
    shape_end = text.index(" ", start.end())
  opcode = _OPCODE.match(text, shape_end)
  if opcode is None:
    return
  end = _close(text, opcode.end() - 1)
  arguments = text[opcode.end() : end - 1]
  computation[start[1]] = Instruction(
      name=start[1],
      opcode=opcode[1],
      shape=text[start.end() : shape_end],
      operands=tuple(_NAME.findall(arguments)),
      arguments=arguments,
      attributes=text[end:],
      is_root=text.lstrip().startswith("ROOT "),
  )


def _close(text: str, start: int) -> int:
  """Index behind the parenthesis that closes the one at `start`."""
  depth = 0
  for found in re.compile(r"[()]").finditer(text, start):
    depth += 1 if found[0] == "(" else -1
    if depth == 0:
      return found.end()
  raise ValueError(f"no end of {text[start:start + 40]!r}")


def runs(program: Program) -> tuple[list[Run], list[str]]:
  """Lists what runs, and the loops of which nobody knows how often they do.

  Of a condition all branches are listed. A loop of unknown length counts once.
  """
  unknown: list[str] = []
  return list(_walk(program, program.entry, 1, unknown)), unknown


def _walk(
    program: Program, name: str, times: int, unknown: list[str]
) -> Iterator[Run]:
  computation = program.computations[name]
  for instruction in computation.values():
    yield Run(instruction, computation, times)
    if instruction.opcode == "while":
      trips = num_trips(program, computation, instruction)
      if trips is None:
        unknown.append(instruction.name)
      body = instruction.called("body")
      if body is not None:
        yield from _walk(program, body, times * (trips or 1), unknown)
    elif instruction.opcode in ("call", "async-start"):
      inner = instruction.called("to_apply") or instruction.called("calls")
      if inner is not None:
        yield from _walk(program, inner, times, unknown)
    elif instruction.opcode == "conditional":
      branches = re.search(
          r"branch_computations=\{([^}]*)\}", instruction.attributes
      )
      for branch in _NAME.findall(branches[1]) if branches else ():
        yield from _walk(program, branch, times, unknown)


def num_trips(
    program: Program, computation: Computation, loop: Instruction
) -> int | None:
  """How often a loop runs; None where the text does not say.

  Args:
    program: The program.
    computation: What the loop stands in.
    loop: A `while`.
  """
  # A GPU's program says it; its counters are often part of a fusion.
  if said := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
    return int(said[1])
  condition = program.computations.get(loop.called("condition") or "", {})
  root = next((one for one in condition.values() if one.is_root), None)
  if root is None:
    return None
  found = _compared(program, condition, root)
  if found is None:
    return None
  left, right = found
  start = computation.get(loop.operands[0])
  first = _number(condition, left, computation, start)
  limit = _number(condition, right, computation, start)
  step = _step(program, condition, left, loop, computation, start)
  if first is None or limit is None or first > limit or not step:
    return None
  return -(-(limit - first) // step)


def _step(
    program: Program,
    condition: Computation,
    counter: str,
    loop: Instruction,
    outside: Computation,
    start: Instruction | None,
) -> int | None:
  """By how much a loop's body lets its counter go up."""
  place = _place(_through_copies(condition, condition.get(counter)))
  body = program.computations.get(loop.called("body") or "", {})
  root = next((one for one in body.values() if one.is_root), None)
  if place is None or root is None or root.opcode != "tuple":
    return None
  added = _through_copies(body, body.get(root.operands[place]))
  if added is None:
    return None
  names = added.operands
  if added.opcode == "fusion":
    inner = program.computations.get(added.called("calls") or "", {})
    added = next((one for one in inner.values() if one.is_root), added)
    names = tuple(
        name if (at := _parameter(inner.get(name))) is None else names[at]
        for name in added.operands
    )
    body = {**inner, **body}
  if added.opcode != "add":
    return None
  numbers = [_number(body, name, outside, start) for name in names]
  places = [_place(_through_copies(body, body.get(name))) for name in names]
  # One of the two is the counter itself, the other is a number.
  if place not in places:
    return None
  return numbers[1 - places.index(place)]


def _place(one: Instruction | None) -> int | None:
  """Which member of a tuple an instruction takes out."""
  if one is None or one.opcode != "get-tuple-element":
    return None
  found = re.search(r"index=(\d+)", one.attributes)
  return int(found[1]) if found else None


def _compared(
    program: Program, condition: Computation, root: Instruction
) -> tuple[str, str] | None:
  """Names, in the condition, of the counter and of what it stays below."""
  names = root.operands
  if root.opcode == "fusion":
    inner = program.computations.get(root.called("calls") or "", {})
    compare = next((one for one in inner.values() if one.is_root), None)
    if compare is None:
      return None
    places = [_parameter(inner.get(name)) for name in compare.operands]
    if any(place is None or place >= len(names) for place in places):
      return None
    names = tuple(names[place] for place in places if place is not None)
    root = compare
  if root.opcode != "compare" or "direction=LT" not in root.attributes:
    return None
  return (names[0], names[1]) if len(names) == 2 else None


def _parameter(instruction: Instruction | None) -> int | None:
  if instruction is None or instruction.opcode != "parameter":
    return None
  return int(instruction.arguments)


def _number(
    condition: Computation,
    name: str,
    outside: Computation,
    start: Instruction | None,
) -> int | None:
  """A whole number of a condition, or of what its loop starts with."""
  one = _through_copies(condition, condition.get(name))
  if one is None:
    return None
  if one.opcode == "constant":
    return _constant(one)
  place = _place(one)
  if place is None or start is None or start.opcode != "tuple":
    return None
  if place >= len(start.operands):
    return None
  first = outside.get(start.operands[place])
  first = _through_copies(outside, first)
  return _constant(first) if first is not None else None


def _through_copies(
    computation: Computation, one: Instruction | None
) -> Instruction | None:
  while one is not None and one.opcode in ("copy", "bitcast", "copy-done"):
    one = computation.get(one.operands[0])
  if one is not None and one.opcode == "copy-start":
    return _through_copies(computation, computation.get(one.operands[0]))
  return one


def _constant(one: Instruction) -> int | None:
  is_whole = one.opcode == "constant" and re.fullmatch(r"-?\d+", one.arguments)
  return int(one.arguments) if is_whole else None
