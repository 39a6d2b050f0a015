"""Which layers read everything, so that the others may take from them.

A layer that is not full takes from the last full one before it. overlap[i, j]
is the share of j's choice that i's has. Two rules:

  fewest  as few full layers as every overlap >= theta allows; of these the plan
          of the largest sum (HyLRA, https://arxiv.org/abs/2602.00777)
  widest  at most so many full layers; the largest smallest overlap, and of the
          plans that have it the largest sum

Both are exact: dynamic programs over the last full layer and how many there
are. The smallest overlap is found first, by bisection, as largest smallest and
sum together have no optimal substructure.

Letters: L layers.
"""

import bisect
from collections.abc import Collection
from typing import NamedTuple

from jaxtyping import Float
import numpy as np

from scansnap_jax.experiment import errors


class Plan(NamedTuple):
  """A plan.

  Attributes:
    full: Layers that read everything, the first among them.
    total: Sum of the others' overlaps.
  """

  full: tuple[int, ...]
  total: float

  @property
  def entry(self) -> str:
    """As systems take it: layers with dots between."""
    return ".".join(map(str, self.full))


def fewest(
    overlap: Float[np.ndarray, "L L"],
    theta: float,
    sensitive: Collection[int] = (),
) -> Plan:
  """Returns the plan of fewest full layers.

  Args:
    overlap: Of source i and layer j > i.
    theta: Least overlap.
    sensitive: Layers that are full whatever they share.
  """
  best = _largest_sums(overlap, theta, sensitive)
  return best[min(best)]


def widest(
    overlap: Float[np.ndarray, "L L"],
    num_full: int,
    sensitive: Collection[int] = (),
) -> Plan:
  """Returns the plan of the largest smallest overlap.

  Args:
    overlap: Of source i and layer j > i.
    num_full: Most full layers.
    sensitive: Layers that are full whatever they share.

  Raises:
    UserError: If the first and the sensitive layers are more than that.
  """
  least = len({0, *sensitive})
  if num_full < least:
    raise errors.UserError(
        f"num_full={num_full}: the first and the sensitive layers are {least}."
    )
  # None above is allowed by all; 2 is no overlap, so that all layers are full.
  levels = sorted({*map(float, overlap[np.triu_indices(len(overlap), 1)]), 2.0})
  fits = lambda theta: len(fewest(overlap, theta, sensitive).full) <= num_full
  number = bisect.bisect_left(levels, True, key=lambda level: not fits(level))
  best = _largest_sums(overlap, levels[number - 1], sensitive)
  plans = [plan for count, plan in best.items() if count <= num_full]
  return max(plans, key=lambda plan: plan.total)


def _largest_sums(
    overlap: Float[np.ndarray, "L L"],
    theta: float,
    sensitive: Collection[int],
) -> dict[int, Plan]:
  """The plan of the largest sum for each number of full layers that can be."""
  table = overlap.tolist()
  # By the last full layer and their number: sum, and the full layers.
  best: dict[tuple[int, int], Plan] = {(0, 1): Plan((0,), 0.0)}
  for layer in range(1, len(table)):
    new: dict[tuple[int, int], Plan] = {}
    for (last, count), plan in best.items():
      as_full = Plan((*plan.full, layer), plan.total)
      known = new.get((layer, count + 1))
      if known is None or known.total < as_full.total:
        new[layer, count + 1] = as_full
      if table[last][layer] >= theta and layer not in sensitive:
        total = plan.total + table[last][layer]
        new[last, count] = Plan(plan.full, total)
    best = new
  found: dict[int, Plan] = {}
  for (_, count), plan in best.items():
    if count not in found or found[count].total < plan.total:
      found[count] = plan
  return found
