"""What a traced function multiplies, and what it moves of some arguments.

Counted from its jaxpr, so that nothing is compiled and nothing runs: shapes of
any size cost the same. A product of [m, k] with [k, n] is 2 m k n FLOPs; of
what is no matrix product a state alone counts, which is read whole and comes
back as another: 4 FLOPs a number, an outer product added and a product with it.
Loops count as often as they run.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import math
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval
from jaxtyping import PyTree

# What lays an array out anew, or writes a few of its entries: still that array.
_SAME = frozenset({
    "broadcast_in_dim",
    "convert_element_type",
    "copy",
    "expand_dims",
    "reshape",
    "squeeze",
    "stop_gradient",
    "transpose",
})
_WRITES = frozenset({"dynamic_update_slice", "scatter", "scatter-add"})
_READS_PARTS = frozenset({"dynamic_slice", "gather", "slice"})


class Unknown(Exception):  # noqa: N818 (an answer, not a fault)
  """Raised where a program does not say how often a loop of it runs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traced:
  """What a call costs.

  Attributes:
    flops: Of its matrix products.
    moved: Bytes that are read or written of each leaf that was asked for: what
      is looked at whole counts once, slices and gathers by their sizes.
  """

  flops: int
  moved: tuple[int, ...] = ()


def trace(
    call: Callable[..., PyTree],
    arguments: Sequence[PyTree],
    kept: Sequence[int] = (),
) -> Traced:
  """Traces a call and counts.

  Args:
    call: Returns arrays; those it keeps come last, as they came in.
    arguments: Arrays or their shapes.
    kept: Leaves of the arguments, by their order, whose bytes are counted.

  Raises:
    Unknown: A loop runs as often as its values say.
  """
  made = jax.make_jaxpr(call)(*arguments).jaxpr
  # Without what no result needs, which no compiler keeps.
  jaxpr, _ = partial_eval.dce_jaxpr(
      made, [True] * len(made.outvars), instantiate=True
  )
  moved, more = _moved_of(jaxpr, tuple(kept))
  return Traced(flops=flops_of(jaxpr) + more, moved=moved)


def flops_of(jaxpr: core.Jaxpr) -> int:
  """FLOPs of the matrix products of a jaxpr."""
  return sum(map(_flops_of_equation, jaxpr.eqns))


def _flops_of_equation(equation: core.JaxprEqn) -> int:
  name = equation.primitive.name
  if name == "dot_general":
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = _array(equation.invars[0]).shape
    length = math.prod(left[axis] for axis in contracted)
    return 2 * math.prod(_array(equation.outvars[0]).shape) * length
  if name == "conv_general_dilated":
    kernel = _array(equation.invars[1]).shape
    out_axis = equation.params["dimension_numbers"].rhs_spec[0]
    per_output = math.prod(kernel) // kernel[out_axis]
    return 2 * math.prod(_array(equation.outvars[0]).shape) * per_output
  inner = list(_jaxprs_of(equation.params))
  if name == "cond":
    return max(map(flops_of, inner))
  total = sum(map(flops_of, inner))
  if name == "scan":
    return total * equation.params["length"]
  if name == "pallas_call" or (name == "while" and total):
    raise Unknown(name)
  return total


def _array(of: Any) -> jax.core.ShapedArray:
  """Shape and type of what a name of a jaxpr, or a literal, stands for."""
  return of.aval


def _jaxprs_of(params: Mapping[str, Any]) -> Iterator[core.Jaxpr]:
  """The functions that an equation calls."""
  for value in params.values():
    for one in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(one, core.ClosedJaxpr):
        yield one.jaxpr
      elif isinstance(one, core.Jaxpr):
        yield one


class _Movement:
  """Follows some arguments through a jaxpr and adds up what is moved of them.

  A name of the jaxpr is a leaf as long as it is that leaf's array, laid out
  anew or with a few entries written.
  """

  def __init__(self, sizes: Mapping[int, int], itemsizes: Mapping[int, int]):
    self.sizes = sizes
    self.itemsizes = itemsizes
    self.parts = dict.fromkeys(sizes, 0)
    self.written = dict.fromkeys(sizes, 0)
    self.whole: set[int] = set()

  def walk(
      self, jaxpr: core.Jaxpr, known: Mapping[core.Var, int], times: int
  ) -> list[int | None]:
    """Returns which leaf each result is; None is another array."""
    leaf: dict[core.Var, int] = dict(known)
    of = lambda x: leaf.get(x) if isinstance(x, core.Var) else None
    for equation in jaxpr.eqns:
      found = [of(x) for x in equation.invars]
      if any(one is not None for one in found):
        results = self._step(equation, found, times)
        for var, one in zip(equation.outvars, results, strict=True):
          if one is not None:
            leaf[var] = one
    return [of(x) for x in jaxpr.outvars]

  def _step(
      self, equation: core.JaxprEqn, found: list[int | None], times: int
  ) -> list[int | None]:
    name = equation.primitive.name
    none: list[int | None] = [None] * len(equation.outvars)
    size = lambda x: math.prod(_array(x).shape)
    inner = list(_jaxprs_of(equation.params))
    first = found[0]
    if name in _WRITES and first is not None:
      update = equation.invars[1 if name == "dynamic_update_slice" else 2]
      self.written[first] += times * size(update) * self.itemsizes[first]
      return [first]
    if name in _SAME and size(equation.outvars[0]) == size(equation.invars[0]):
      return [first]
    if name in _READS_PARTS and first is not None:
      num = times * size(equation.outvars[0])
      self.parts[first] += num * self.itemsizes[first]
      return none
    if name == "cond":
      branches = [
          self.walk(branch, _zipped(branch.invars, found[1:]), times)
          for branch in inner
      ]
      return branches[0]
    if len(inner) == 1 and name not in _WRITES:
      (body,) = inner
      known = _zipped(body.invars[-len(found) :], found)
      if name == "scan":
        return self._scan(equation, body, known, times)
      return self.walk(body, known, times)
    self.whole |= {one for one in found if one is not None}
    return none

  def _scan(
      self,
      equation: core.JaxprEqn,
      body: core.Jaxpr,
      known: Mapping[core.Var, int],
      times: int,
  ) -> list[int | None]:
    results = self.walk(body, known, times * equation.params["length"])
    num_carry = equation.params["num_carry"]
    return results[:num_carry] + [None] * (len(results) - num_carry)

  def moved(self, leaf: int, is_kept: bool) -> int:
    """Bytes of a leaf; one that comes back as another array is written."""
    read = self.sizes[leaf] if leaf in self.whole else self.parts[leaf]
    return read + (self.written[leaf] if is_kept else self.sizes[leaf])

  def flops(self, leaf: int, is_kept: bool) -> int:
    """Of products number by number, as those of a query with a state."""
    is_state = leaf in self.whole and not is_kept
    return 4 * self.sizes[leaf] // self.itemsizes[leaf] if is_state else 0


def _zipped(
    names: Sequence[core.Var], found: Sequence[int | None]
) -> dict[core.Var, int]:
  pairs = zip(names, found, strict=True)
  return {var: one for var, one in pairs if one is not None}


def _moved_of(
    jaxpr: core.Jaxpr, kept: tuple[int, ...]
) -> tuple[tuple[int, ...], int]:
  """Bytes moved of each leaf, and FLOPs of what multiplies them."""
  avals = {leaf: _array(jaxpr.invars[leaf]) for leaf in kept}
  itemsizes = {leaf: aval.dtype.itemsize for leaf, aval in avals.items()}
  sizes = {
      leaf: math.prod(aval.shape) * itemsizes[leaf]
      for leaf, aval in avals.items()
  }
  movement = _Movement(sizes, itemsizes)
  known = {jaxpr.invars[leaf]: leaf for leaf in kept}
  results = set(movement.walk(jaxpr, known, 1))
  moved = tuple(movement.moved(leaf, leaf in results) for leaf in kept)
  return moved, sum(movement.flops(leaf, leaf in results) for leaf in kept)
