"""Reads libtpu's dump of a kernel's final schedule: loops, branches, units.

A bundle is what one TensorCore issues in a cycle when nothing stalls. The dump
has a line for each:

  0x53   : > { %381 = sbr.rel (%p7542_p5) target = $region48 } /* ... */

A backward `sbr` ends a loop; a forward one, which skips what follows its delay
slots, begins a branch: the body of a `pl.when`, a side of a `lax.cond`, or the
guard of a loop that may run zero times.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import re
from typing import Any, Literal, NamedTuple

import numpy as np

_BUNDLE = re.compile(r"^ *(?:0x)?([0-9a-f]+) +[^{}]*:[ >]*\{", re.MULTILINE)
_BRANCH = re.compile(r"= sbr\.rel [^;}]*target = \$region(\d+)")
_START = re.compile(r"Start(?:/End empty)? region (\d+)")


Kind = Literal["kernel", "loop", "branch"]


class Code(NamedTuple):
  """A schedule as text.

  Attributes:
    bundles: The text of each.
    region_starts: The bundles that regions begin with, by number of region.
  """

  bundles: Sequence[str]
  region_starts: dict[int, int]


@dataclasses.dataclass(frozen=True)
class Region:
  """Code that is entered as a whole.

  Attributes:
    kind: The kernel, the body of a loop, or what a branch may skip.
    start: Index of its first bundle.
    bundles: How many it has, inner regions not counted.
    units: Operations in those bundles, by unit.
    issued: How many of them are issued while the kernel runs; 0 if unknown.
    regions: Inner regions, in order.
  """

  kind: Kind
  start: int
  bundles: int
  units: dict[str, int]
  issued: int
  regions: tuple["Region", ...]

  def walk(self) -> Iterator["Region"]:
    """Yields the region and all within, in the order of their starts."""
    yield self
    for region in self.regions:
      yield from region.walk()

  @property
  def total_bundles(self) -> int:
    """Bundles with inner regions, each counted once."""
    return sum(region.bundles for region in self.walk())

  @classmethod
  def from_json(cls, tree: dict[str, Any]) -> "Region":
    """Rebuilds what `dataclasses.asdict` took apart."""
    return cls(**tree | {"regions": tuple(map(cls.from_json, tree["regions"]))})


def parse_units(text: str) -> tuple[dict[str, int], dict[str, np.ndarray]]:
  """Reads `*-final_hlo-static-per-bundle-utilization.txt`.

  Returns:
    The capacity of each unit, and how many operations each bundle issues.
  """
  lines = text.splitlines()
  names = [name.strip() for name in lines[1].split(",")]
  capacity = dict(zip(names, map(int, lines[2].split()), strict=True))
  rows = np.array([row.split() for row in lines[4:] if row.strip()], int)
  return capacity, dict(zip(names, rows.T, strict=True))


def parse_code(text: str) -> Code:
  """Reads `*-final_bundles.txt`."""
  matches = list(_BUNDLE.finditer(text))
  ends = [match.start() for match in matches[1:]] + [len(text)]
  lines = [text[m.end() : end] for m, end in zip(matches, ends, strict=True)]
  region_starts = {
      int(region): index
      for index, line in reversed(list(enumerate(lines)))
      for region in _START.findall(line)
  }
  return Code(lines, region_starts)


def make_tree(
    code: Code,
    units: dict[str, np.ndarray],
    branch_delay: int,
    issued: np.ndarray | None = None,
) -> Region:
  """Finds the loops and branches.

  Args:
    code: Of `parse_code`.
    units: Operations by bundle, of `parse_units`.
    branch_delay: Bundles after a branch that are executed in any case.
    issued: How often each bundle is issued; None if that is not known.
  """
  jumps = [
      (index, code.region_starts.get(int(target), index + 1 + branch_delay))
      for index, line in enumerate(code.bundles)
      for target in _BRANCH.findall(line)
  ]
  # A jump backwards ends a loop, and its target is the loop's first bundle.
  heads = [target for index, target in jumps if target <= index]
  intervals: list[tuple[int, int, Kind]] = []
  for index, target in jumps:
    after = index + 1 + branch_delay
    if target <= index:
      intervals.append((target, after, "loop"))
      continue
    # A loop that begins right behind its guard is all within it.
    after = min([after, *(head for head in heads if index < head < after)])
    intervals.append((after, target, "branch"))
  # Without counts the tree still says where code is.
  if issued is None:
    issued = np.zeros(len(code.bundles), np.int64)
  return _nest(intervals, len(code.bundles), units, issued)


def _nest(
    intervals: Sequence[tuple[int, int, Kind]],
    num_bundles: int,
    units: dict[str, np.ndarray],
    issued: np.ndarray,
) -> Region:
  """Makes a tree of [start, end) intervals, each cut where its parent ends."""
  # Of equal ones the branch is outside: it guards the loop.
  pending = sorted(intervals, key=lambda x: (x[0], -x[1], x[2]))

  def build(start: int, end: int, kind: Kind) -> Region:
    inner, position = [], start
    # Bundles of inner regions are theirs alone.
    own = np.ones(end - start, bool)
    while pending and pending[0][0] < end:
      inner_start, inner_end, inner_kind = pending.pop(0)
      inner_start, inner_end = max(inner_start, position), min(inner_end, end)
      if inner_start < inner_end:
        inner.append(build(inner_start, inner_end, inner_kind))
        own[inner_start - start : inner_end - start] = False
        position = inner_end
    work = {name: int(ops[start:end] @ own) for name, ops in units.items()}
    runs = int(issued[start:end] @ own)
    return Region(kind, start, int(own.sum()), work, runs, tuple(inner))

  return build(0, num_bundles, "kernel")
