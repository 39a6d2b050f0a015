"""What it means that all learning rates of a sweep share their seeds.

A seed decides data and start, so that the runs of one seed are alike at all
learning rates. The points of Figure 6 of Scan & Snap
(https://arxiv.org/abs/2305.16380) are then fewer than they look, and two of
them are best compared seed by seed.

Letters as in `scansnap_jax`.
"""

from typing import Any

from jaxtyping import Float
import numpy as np

from scansnap_jax import train
from scansnap_jax.experiment import intervals


def summarize(result: train.Result) -> dict[str, Any] | None:
  """Says how far the pairs of rates of a data setting hang together.

  Args:
    result: Its runs.

  Returns:
    `num_cells`, the pairs of rates; `mean_correlation` of their final
    distinct-token entropies over seeds; `effective_cells`, as many independent
    ones as spread as far, (sum lambda)^2 / sum lambda^2 over the eigenvalues of
    the correlations; and `lowest`, see `_lowest`. None of fewer than three
    seeds or two pairs, or where an entropy is the same for all seeds.
  """
  seeds, rates = np.unique(result.runs.seed), _rates(result)
  if len(seeds) < 3 or len(rates) < 2:
    return None
  entropy = _by_seed(result)
  if not np.ptp(entropy, axis=0).all():
    return None
  correlations = np.corrcoef(entropy.T)
  above = correlations[np.triu_indices(len(rates), 1)]
  squares = (correlations**2).sum()  # The trace of C^2, and that of C is J.
  return {
      "num_last": result.num_last,
      "num_next": result.classes.num_classes,
      "num_seeds": len(seeds),
      "num_cells": len(rates),
      "mean_correlation": float(above.mean()),
      "effective_cells": float(len(rates) ** 2 / squares),
      "lowest": [_lowest(rates, entropy, lr_z) for lr_z in _first(rates)],
  }


def _first(rates: list[tuple[float, float]]) -> list[float]:
  return sorted({lr_z for lr_z, _ in rates})


def _rates(result: train.Result) -> list[tuple[float, float]]:
  """The pairs (eta_Z, eta_Y / eta_Z), in increasing order."""
  pairs = zip(result.runs.lr_z, result.runs.lr_ratio, strict=True)
  return sorted({(float(lr_z), float(ratio)) for lr_z, ratio in pairs})


def _by_seed(result: train.Result) -> Float[np.ndarray, "S J"]:
  """Final entropies in float64, a row a seed and a column a pair of rates."""
  order = np.lexsort((result.runs.lr_ratio, result.runs.lr_z, result.runs.seed))
  final = result.history.distinct_entropy[order, -1].astype(np.float64)
  return final.reshape(len(np.unique(result.runs.seed)), -1)


def _lowest(
    rates: list[tuple[float, float]],
    entropy: Float[np.ndarray, "S J"],
    lr_z: float,
) -> dict[str, Any]:
  """Finds the ratio of lowest entropy at one eta_Z, and how surely it is that.

  Returns:
    `lr_z`, `lr_ratio` of the least mean, and `next`, the other ratio from which
    it is least apart: `lr_ratio` with mean, low and high of the differences
    within seeds (95 %, Student's t). None of one ratio alone.
  """
  own = [j for j, pair in enumerate(rates) if pair[0] == lr_z]
  least = min(own, key=lambda j: entropy[:, j].mean())
  others = [
      {
          "lr_ratio": rates[j][1],
          **intervals.interval(entropy[:, j] - entropy[:, least]),
      }
      for j in own
      if j != least
  ]
  nearest = min(others, key=lambda other: other["low"], default=None)
  return {"lr_z": lr_z, "lr_ratio": rates[least][1], "next": nearest}
