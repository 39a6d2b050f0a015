"""Claims of papers: what was expected, what was measured, whether it holds.

A claim that fails is reported as failed, in the finding first; what is NaN or
infinite is no finding, and ends the run.
"""

from collections.abc import Iterator, Mapping, Sequence
import math
from typing import Any

import numpy as np

from scansnap_jax.experiment import errors

HOLDS, FAILS = "holds", "FAILED"

Row = dict[str, str]


def row(
    claim: str, expected: str, measured: str, holds: bool | np.bool_
) -> Row:
  """Returns a row of the table of claims.

  Args:
    claim: A sentence without its full stop.
    expected: Of the measurement, with the bound that decides.
    measured: With its spread, where it has one.
    holds: Whether it is as expected.
  """
  verdict = HOLDS if holds else FAILS
  return dict(claim=claim, expected=expected, measured=measured, it=verdict)


def finding(rows: Sequence[Row]) -> str:
  """Says how many claims hold, and names each that does not."""
  if not rows:
    return "Nothing is claimed of what was measured with these settings."
  failed = [each for each in rows if each["it"] != HOLDS]
  count = f"{len(rows) - len(failed)} of {len(rows)} claims hold."
  if not failed:
    return f"{count} Each is in the table, expected beside measured."
  told = "; ".join(
      f"{each['claim']} (expected {each['expected']}, measured"
      f" {each['measured']})"
      for each in failed
  )
  return f"{count} FAILED: {told}."


def require_finite(name: str, tree: Any) -> None:
  """Raises UserError, naming the place, if a number is NaN or infinite.

  Args:
    name: Of what was measured.
    tree: Mappings, lists and arrays of numbers; text and None pass.
  """
  for path, value in _numbers(tree, name):
    if not math.isfinite(value):
      raise errors.UserError(
          f"{path} is {value}: training diverged, and what was measured of it"
          " would be no finding. Use a smaller rate, in a new workdir."
      )


def _numbers(tree: Any, path: str) -> Iterator[tuple[str, float]]:
  if isinstance(tree, Mapping):
    for name, value in tree.items():
      yield from _numbers(value, f"{path}, {name}")
  elif isinstance(tree, (list, tuple)):
    for i, value in enumerate(tree):
      yield from _numbers(value, f"{path}[{i}]")
  elif hasattr(tree, "dtype"):
    yield from _numbers(np.asarray(tree).tolist(), path)
  elif isinstance(tree, float):
    yield path, tree
