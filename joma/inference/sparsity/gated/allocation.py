"""A budget of weights, shared out over layers.

Each layer has options, which read so much and cost so much. What is chosen has
the least cost of all choices that read no more than it does (the lower convex
hull of each layer's options, whose steepest segments are taken first), as near
below the budget as hulls allow.

Letters: L layers, O options.
"""

from jaxtyping import Float, Int
import numpy as np


def allocate(
    reads: Float[np.ndarray, "L O"],
    costs: Float[np.ndarray, "L O"],
    budget: int | float,
) -> Int[np.ndarray, "L"]:
  """Returns the option of each layer.

  Args:
    reads: Weights that an option reads.
    costs: What it costs in quality.
    budget: Of all layers together. Where even the least options read more,
      those are returned.
  """
  hulls = [_hull(*layer) for layer in zip(reads, costs, strict=True)]
  chosen = np.array([hull[0] for hull in hulls])
  steps = [
      ((costs[i, b] - costs[i, a]) / (reads[i, b] - reads[i, a]), i, b)
      for i, hull in enumerate(hulls)
      for a, b in zip(hull, hull[1:], strict=False)
  ]
  rows = np.arange(len(chosen))
  # Slopes of a hull rise, so that a layer's own steps come in their order.
  for _, layer, option in sorted(steps):
    trial = chosen.copy()
    trial[layer] = option
    if reads[rows, trial].sum() > budget:
      break
    chosen = trial
  return chosen


def _hull(
    reads: Float[np.ndarray, "O"], costs: Float[np.ndarray, "O"]
) -> list[int]:
  """Options of the lower convex hull, from that which reads least on."""
  hull: list[int] = []
  for option in np.lexsort((costs, reads)).tolist():
    # More weights for no less cost: never chosen.
    if hull and costs[option] >= costs[hull[-1]]:
      continue
    while len(hull) > 1 and not _turns_up(
        reads, costs, hull[-2], hull[-1], option
    ):
      hull.pop()
    hull.append(option)
  return hull


def _turns_up(
    reads: np.ndarray, costs: np.ndarray, a: int, b: int, c: int
) -> bool:
  """Whether b lies below the line from a to c."""
  before = (costs[b] - costs[a]) * (reads[c] - reads[a])
  return bool(before < (costs[c] - costs[a]) * (reads[b] - reads[a]))
