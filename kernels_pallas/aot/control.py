"""Runs the scalar half of a kernel's final schedule: how often each bundle is.

A schedule says how long a loop's body is, not how often it runs. That is up to
the scalar unit and to the tables (tiles to visit, say) that it reads, and both
are known: so the scalar instructions on which branches depend are executed
here, one after the other, with the tables that the program passes, and bundles
are counted. Vectors, semaphores and all other transfers are left out. Where a
branch depends on them there is no count: `Undecided` is raised.
"""

from collections.abc import Callable, Mapping, Sequence
import re
from typing import Any

import numpy as np

from kernels_pallas.aot import bundles as bundles_lib
from kernels_pallas.aot import chips
from kernels_pallas.aot import scalars

# Beyond that a loop is taken for one that does not end.
_MAX_STEPS = 50_000_000
_OPERAND = re.compile(
    r"%(?P<name>s\d+)\w* = inlined_call_operand\.(?P<space>\w+) \[shape: [^;]*?"
    r"index: (?P<index>\d+), kind: input"
)
# An array of one number is passed in a register.
_SCALAR = re.compile(
    r"%(?P<name>s\d+)\w* = inlined_call_operand\.<no memory space>"
    r" \[shape: [^;]*?index: (?P<index>\d+), kind: input"
)
_CORE = re.compile(
    r"sld \[smem:\[(#\w+)\]\] *(?:\([^)]*\) *)?/\* [^*]*core id \*/"
)
_UNIT_BYTES = 512  # Of an address that is not in HBM.
_NOTHING = np.zeros(0, np.int32)
# Operands are taken to lie so far apart; there is room for 255 in 32 bits of
# granules.
_OPERAND_BYTES = 1 << 29


# Executes an instruction, given whether a branch is under way; returns where a
# branch goes.
_Action = Callable[[bool], int | None]


class Undecided(RuntimeError):
  """A branch depends on what is not known."""


def count(
    code: bundles_lib.Code,
    chip: chips.Chip,
    operands: Mapping[int, np.ndarray],
    core: int = 0,
) -> np.ndarray:
  """Counts how often each bundle is issued while the kernel runs.

  Args:
    code: The kernel's.
    chip: What it was compiled for.
    operands: Words of those operands whose values are known, as they lie in
      memory, by their number.
    core: Which of the two of a megacore chip.

  Raises:
    Undecided: If that depends on more than scalars, or no end is in sight.
  """
  return _Machine(code, chip, operands, core).run()


class _Machine:
  """Values, scalar memory, and a list of actions for each bundle."""

  def __init__(
      self,
      source: bundles_lib.Code,
      chip: chips.Chip,
      operands: Mapping[int, np.ndarray],
      core: int,
  ):
    self._region_starts = source.region_starts
    self._chip = chip
    self._operands = operands
    self._values: dict[str, Any] = {}
    self._stamps: dict[str, int] = {}
    self._memory: dict[int, Any] = {}
    self._allocations: dict[str, int] = {}
    self._foreign: set[str] = set()
    self._clock = 0
    for text in source.bundles:
      for match in _OPERAND.finditer(text):
        is_hbm = match["space"] == "hbm"
        unit = chip.hbm_unit_bytes if is_hbm else _UNIT_BYTES
        number = (int(match["index"]) + 1) * (_OPERAND_BYTES // unit)
        self._values[match["name"]] = number
      for match in _SCALAR.finditer(text):
        words = operands.get(int(match["index"]), _NOTHING)
        if len(words):
          self._values[match["name"]] = int(words[0]) & 0xFFFFFFFF
      for name in _CORE.findall(text):
        self._memory[self._reader(name)()] = core
    code = [scalars.parse(text) for text in source.bundles]
    # Most scalars are addresses of vectors, on which no branch depends: they
    # are left out.
    needed = _needed(code)
    self._is_merged = {
        name
        for bundle in code
        for x in bundle
        if x.op.endswith("phi")
        for name in x.reads
    }
    self._actions = [self._compile(bundle, needed) for bundle in code]

  def run(self) -> np.ndarray:
    """Runs it; returns how often each bundle was issued."""
    num = len(self._actions)
    edges = np.zeros(num + 1, np.int64)
    following = _following(self._actions)
    start = position = 0
    jump = None  # Where to leave, and where to.
    for _ in range(_MAX_STEPS):
      # Bundles in which nothing happens are jumped over; `edges` counts them
      # all the same, as differences at the ends of each straight run.
      position = following[position]
      if jump is not None and position >= jump[0]:
        edges[start] += 1
        edges[jump[0]] -= 1
        start = position = jump[1]
        jump = None
        continue
      if position == num:
        edges[start] += 1
        edges[num] -= 1
        return np.cumsum(edges[:-1])
      for action in self._actions[position]:
        target = action(jump is not None)
        if target is not None:
          # What is in the delay slots is executed first.
          after = min(position + 1 + self._chip.branch_delay, num)
          jump = after, after if target < 0 else target
      position += 1
    raise Undecided(f"no end after {_MAX_STEPS} steps")

  def _compile(
      self, bundle: Sequence[scalars.Instruction], needed: set[str]
  ) -> list[_Action]:
    # A merge happens on entry, whatever its place in the bundle.
    order = sorted(bundle, key=lambda x: not x.op.endswith("phi"))
    return [self._action(x) for x in order if _matters(x, needed)]

  def _action(self, x: scalars.Instruction) -> _Action:
    """What executes an instruction, given whether a branch is under way."""
    guard = self._reader(x.guard) if x.guard else lambda: True
    if x.op == "sbr.rel":
      return self._branch(x, guard)
    if x.is_copy_to_smem:
      return self._copy(x, guard)
    if x.op == "sst":
      return self._store(x, guard)
    if x.op.endswith("phi"):
      return self._merge(x)
    if x.op == "sld":
      address = self._reader(x.operands[0])
      read = lambda: self._memory.get(address(), scalars.UNKNOWN)
      return self._define(x, guard, read)
    compute = scalars.operation(x.op)
    readers = [self._reader(text) for text in x.operands]
    if compute is None:
      self._foreign.add(x.op)
      return self._define(x, guard, lambda: scalars.UNKNOWN)
    return self._define(x, guard, lambda: compute(*[r() for r in readers]))

  def _define(
      self,
      x: scalars.Instruction,
      guard: Callable[[], scalars.Value],
      compute: Callable[[], scalars.Value],
  ) -> _Action:
    values, name = self._values, x.name
    is_merged = name in self._is_merged
    old = self._reader(x.old) if x.old else None

    def action(_: bool) -> int | None:
      holds = guard()
      # A predicate that is not known leaves the value unknown, not the old one.
      if holds is True:
        values[name] = compute()
      elif holds is scalars.UNKNOWN:
        values[name] = scalars.UNKNOWN
      elif old is not None:
        values[name] = old()
      if is_merged:
        self._clock += 1
        self._stamps[name] = self._clock

    return action

  def _merge(self, x: scalars.Instruction) -> _Action:
    """The operand that was defined last is the one that arrives."""
    names = [text.removeprefix("%").split("_")[0] for text in x.operands]
    latest = lambda: max(names, key=lambda name: self._stamps.get(name, 0))
    return self._define(
        x, lambda: True, lambda: self._values.get(latest(), scalars.UNKNOWN)
    )

  def _branch(
      self, x: scalars.Instruction, guard: Callable[[], scalars.Value]
  ) -> _Action:
    # A region that is nowhere is empty: the code goes on after the branch.
    target = -1 if x.target is None else self._region_starts.get(x.target, -1)

    def action(is_leaving: bool) -> int | None:
      if is_leaving:  # A branch that follows one that is taken does nothing.
        return None
      holds = guard()
      if holds is scalars.UNKNOWN:
        raise Undecided(
            f"branch to region {x.target} on {x.guard}; not understood:"
            f" {', '.join(sorted(self._foreign)) or 'nothing'}"
        )
      return target if holds else None

    return action

  def _store(
      self, x: scalars.Instruction, guard: Callable[[], scalars.Value]
  ) -> _Action:
    address, value = map(self._reader, x.operands)

    def action(_: bool) -> int | None:
      if guard() is not False:
        self._memory[address()] = value()

    return action

  def _copy(
      self, x: scalars.Instruction, guard: Callable[[], scalars.Value]
  ) -> _Action:
    source, size, target = map(self._reader, x.operands[:3])
    granule = self._chip.copy_bytes

    def action(_: bool) -> int | None:
      if guard() is False:
        return
      if len(x.operands) > 4:
        raise Undecided(f"{x.op} with strides")
      # The address says which operand it is in, as each has its own range.
      words, offset, place = (), 0, source()
      if place is not scalars.UNKNOWN:
        which, offset = divmod(place * granule, _OPERAND_BYTES)
        words = self._operands.get(which - 1, ())
      for i in range(size() * granule // 4):
        place = offset // 4 + i
        value = int(words[place]) if place < len(words) else scalars.UNKNOWN
        self._memory[target() + i] = value

    return action

  def _reader(self, text: str) -> Callable[[], Any]:
    """What evaluates an operand: a sum of constants and values."""
    if text.startswith("!"):
      inner = self._reader(text[1:])
      negate = scalars.OPERATIONS["pneg"]
      return lambda: negate(inner())
    names, known = [], 0
    for term in scalars.terms(text):
      if term.startswith("%"):
        names.append(term[1:].split("_")[0])
        continue
      number = scalars.constant(term, self._allocations)
      if number is None:
        return lambda: scalars.UNKNOWN
      known += number
    values, unknown = self._values, scalars.UNKNOWN
    if not names:
      return lambda: known
    if len(names) == 1 and not known:
      name = names[0]
      return lambda: values.get(name, unknown)
    mask = 0xFFFFFFFF
    return lambda: (
        sum((values.get(name, unknown) for name in names), known) & mask
    )


def _needed(code: Sequence[Sequence[scalars.Instruction]]) -> set[str]:
  """Values that branches and scalar memory depend on, however indirectly."""
  definitions: dict[str, scalars.Instruction] = {}
  pending: list[str] = []
  for bundle in code:
    for x in bundle:
      if x.name:
        definitions[x.name] = x
      if x.op in ("sbr.rel", "sst") or x.is_copy_to_smem:
        pending.extend(x.reads)
  needed: set[str] = set()
  while pending:
    name = pending.pop()
    if name in needed:
      continue
    needed.add(name)
    if name in definitions:
      pending.extend(definitions[name].reads)
  return needed


def _matters(x: scalars.Instruction, needed: set[str]) -> bool:
  if x.op.startswith("inlined_call_operand"):
    return False
  is_effect = x.op in ("sbr.rel", "sst") or x.is_copy_to_smem
  return is_effect or x.name in needed


def _following(actions: Sequence[Sequence[Any]]) -> list[int]:
  """The next bundle, this one included, in which something happens."""
  following = [len(actions)] * (len(actions) + 1)
  for index in range(len(actions) - 1, -1, -1):
    following[index] = index if actions[index] else following[index + 1]
  return following
