"""In which order strips are computed, and how many tiles of keys each reads.

A compiled loop body reads a fixed number of tiles. The rows of tiles are
therefore sorted into a few widths, one loop each. Lists that are known while
tracing get the widths that waste least; for others the widths are spread over
all that may come, and the loops find out how often they run.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from kernels_pallas import masks
from kernels_pallas.hardware import types as hw_types

# A loop body takes about 0.1 s to compile.
_NUM_WIDTHS = 6
# Widths of lists that are not known: each is so many times the one before.
_RATIO = 1.6
_NUM_TRACED_WIDTHS = 8


class Loop(NamedTuple):
  """Items order[start:stop] read `width` tiles each.

  Attributes:
    width: Tiles read; those past the number of valid ones are masked.
    start: Int or traced int.
    stop: Int or traced int.
    is_masked: Whether a mask has to be applied.
  """

  width: int
  start: hw_types.Index
  stop: hw_types.Index
  is_masked: bool


def make_loops(
    num_valid: masks.AnyArray, is_full: masks.AnyArray, max_width: int
) -> tuple[Any, list[Loop]]:
  """Sorts items by the number of their tiles.

  Args:
    num_valid: Tiles of each item, int [I].
    is_full: bool [I], whether all of an item's tiles are allowed wholly.
    max_width: Upper bound of `num_valid`.

  Returns:
    The order of the items, int32 [I], and loops over parts of it.
  """
  is_known = isinstance(num_valid, np.ndarray) and isinstance(
      is_full, np.ndarray
  )
  xp = np if is_known else jnp
  if is_known:
    widths = _best_widths(np.maximum(num_valid, 1))
  else:
    fractions = _RATIO ** -np.arange(_NUM_TRACED_WIDTHS)
    widths = np.unique(np.ceil(max_width * fractions).astype(np.int32))
  # Each item goes to the narrowest loop that holds its tiles.
  bucket = xp.searchsorted(xp.asarray(widths), num_valid)
  order = xp.argsort(bucket, stable=True).astype(xp.int32)
  bounds = xp.searchsorted(bucket[order], xp.arange(len(widths) + 1))
  loops = []
  for i, width in enumerate(widths.tolist()):
    start, stop, is_masked = bounds[i], bounds[i + 1], True
    if is_known:
      start, stop = int(start), int(stop)
      here = order[start:stop]
      is_masked = not (is_full[here] & (num_valid[here] == width)).all()
    loops.append(Loop(width, start, stop, is_masked))
  return order, loops


def _best_widths(num_valid: np.ndarray) -> np.ndarray:
  """At most `_NUM_WIDTHS` widths; the sum over items of theirs is least."""
  sizes, counts = np.unique(num_valid, return_counts=True)
  items = np.cumsum(counts)
  # cost[i]: of the sizes up to i; from_[k][i]: where the last but k ends.
  cost, ends = items * sizes, []
  for _ in range(min(_NUM_WIDTHS, len(sizes)) - 1):
    # Sizes up to j by fewer widths, those after j up to i by width sizes[i].
    step = cost[:, None] + (items - items[:, None]) * sizes
    step = np.where(np.tri(len(sizes), k=0, dtype=bool).T, step, cost)
    ends.append(step.argmin(axis=0))
    cost = step.min(axis=0)
  last, widths = len(sizes) - 1, []
  for end in [*ends[::-1], None]:
    widths.append(sizes[last])
    if end is not None:
      last = end[last]
  return np.unique(widths).astype(np.int32)
