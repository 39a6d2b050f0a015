"""What a program is known to pass to its kernels, as it lies in memory.

A mask that is known while a program is traced becomes constants in it: lists of
tiles, for one. What follows from such constants alone is evaluated here.
"""

from collections.abc import Sequence
import math
import re
from typing import Any, NamedTuple

import jax
import jax.extend as jex
import numpy as np

from kernels_pallas.aot import hlo as hlo_lib

_LAYOUT = re.compile(
    r"[a-z]\d+\[(?P<shape>[\d,]*)\]"
    r"\{(?P<order>[\d,]*):T\((?P<tile>[\d,]+)\)(?P<packed>\(\d,1\))?"
)
_LANES = 128


class Call(NamedTuple):
  """A call of a kernel.

  Attributes:
    num_steps: Of its grid, on all cores; None where data decide.
    images: Memory words of its integer operands, where they are known, by
      number of the operand.
  """

  num_steps: int | None
  images: dict[int, np.ndarray]


def of_kernels(jaxpr: jex.core.ClosedJaxpr, hlo: str) -> dict[str, Call]:
  """Finds out how a program calls its Pallas kernels.

  Args:
    jaxpr: The closed jaxpr of the program.
    hlo: Text of the compiled program.

  Returns:
    By name of the kernel in the text.
  """
  traced = _traced_calls(jaxpr)
  found = {}
  for name, layouts in hlo_lib.kernel_operands(hlo).items():
    shapes = [_shape(layout) for layout in layouts]
    # The text has no link to the jaxpr but order and shapes of operands.
    fitting = (x for x in traced if [shape for shape, _ in x[1]] == shapes)
    call = next(fitting, None)
    if call is None:
      found[name] = Call(None, {})
      continue
    traced = [x for x in traced if x is not call]
    images = {
        number: image(value, layout)
        for number, ((_, value), layout) in enumerate(
            zip(call[1], layouts, strict=True)
        )
        if value is not None and value.dtype.kind in "iu"
    }
    images = {k: v for k, v in images.items() if v is not None}
    found[name] = Call(_num_steps(call[0]), images)
  return found


def image(value: np.ndarray, layout: str) -> np.ndarray | None:
  """The 32-bit words of an array of integers in a TPU's memory.

  Args:
    value: The array.
    layout: As HLO has it: s8[1,4,4]{2,1,0:T(4,128)(4,1)}.

  Returns:
    int32 words, padding included; None for layouts of other kinds.
  """
  match = _LAYOUT.match(layout)
  if match is None:
    return None
  order = [int(x) for x in match["order"].split(",") if x]
  tile = [int(x) for x in match["tile"].split(",")]
  if order != sorted(order, reverse=True) or tile[-1] % _LANES:
    return None
  rows, lanes = (1, *tile)[-2:]
  value = value.reshape(-1, *((1, 1) + value.shape)[-2:])
  padding = [
      (0, -n % m) for n, m in zip(value.shape, (1, rows, lanes), strict=True)
  ]
  value = np.pad(value, padding)
  value = value.reshape(len(value), -1, rows, value.shape[2] // lanes, lanes)
  # Tiles of (rows, lanes) one after the other, as memory has them.
  value = value.swapaxes(2, 3)
  if match["packed"]:  # So many rows share a word.
    num = int(match["packed"][1])
    value = value.reshape(*value.shape[:3], rows // num, num, lanes)
    value = value.swapaxes(-1, -2)
  return np.ascontiguousarray(value).view(np.int32).ravel()


def _shape(layout: str) -> tuple[int, ...]:
  dimensions = layout[layout.index("[") + 1 : layout.index("]")]
  return tuple(int(n) for n in dimensions.split(",") if n)


def _num_steps(grid: Sequence[Any]) -> int | None:
  is_known = all(isinstance(n, int) for n in grid)
  return math.prod(grid) if is_known else None


# Its grid; of each operand the shape, and the value or None.
_Traced = tuple[Sequence[Any], list[tuple[tuple[int, ...], np.ndarray | None]]]


def _traced_calls(closed: jex.core.ClosedJaxpr) -> list[_Traced]:
  """The calls in a jaxpr, in order, also inside calls of functions."""
  found: list[_Traced] = []

  def walk(
      jaxpr: jex.core.Jaxpr, consts: Sequence[Any], args: Sequence[Any]
  ) -> list[Any]:
    known = dict(zip(jaxpr.constvars, consts, strict=True))
    known |= dict(zip(jaxpr.invars, args, strict=True))
    read = lambda x: x.val if hasattr(x, "val") else known.get(x)
    for eqn in jaxpr.eqns:
      values = [read(x) for x in eqn.invars]
      outs = [None] * len(eqn.outvars)
      # Only what follows from constants is evaluated; traced arguments are
      # None.
      if eqn.primitive.name == "pallas_call":
        arrays = [
            (
                tuple(getattr(x.aval, "shape", ())),
                None if value is None else np.asarray(value),
            )
            for x, value in zip(eqn.invars, values, strict=True)
        ]
        found.append((eqn.params["grid_mapping"].grid, arrays))
      elif (inner := _callee(eqn)) is not None:
        outs = walk(inner.jaxpr, inner.consts, values)
      elif all(value is not None for value in values):
        outs = _evaluate(eqn, values)
      known |= dict(zip(eqn.outvars, outs, strict=True))
    return [read(x) for x in jaxpr.outvars]

  walk(closed.jaxpr, closed.consts, [None] * len(closed.jaxpr.invars))
  return found


def _callee(eqn: jex.core.JaxprEqn) -> jex.core.ClosedJaxpr | None:
  """The closed jaxpr of a plain call of a function."""
  for name in ("jaxpr", "call_jaxpr", "of"):
    inner = eqn.params.get(name)
    is_call = eqn.primitive.name not in ("scan", "shard_map")
    if is_call and hasattr(inner, "jaxpr"):
      return inner
  return None


def _evaluate(eqn: jex.core.JaxprEqn, values: Sequence[Any]) -> list[Any]:
  with jax.default_device(jax.devices("cpu")[0]):
    outs = eqn.primitive.bind(*values, **eqn.params)
  return list(outs) if eqn.primitive.multiple_results else [outs]
