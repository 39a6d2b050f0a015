"""Means over runs and their 95 % intervals.

Letters as in `scansnap_jax`.
"""

from collections.abc import Mapping, Sequence
import functools
from typing import Any

import jax
from jaxtyping import Float
import numpy as np

from scansnap_jax.experiment import errors


def interval(
    values: Float[Any, "R *s"],
    *,
    least: float | int = -np.inf,
    most: float | int = np.inf,
    is_positive: bool = False,
) -> dict[str, Any]:
  """Computes the mean over runs and its 95 % interval by Student's t.

  Args:
    values: One row a run, of two runs or more.
    least: Least value that there can be; the interval ends there.
    most: Largest value that there can be.
    is_positive: The values are positive and range over decades: take the
      geometric mean, and its interval, by logarithms. Where a value is 0, all
      of it is 0.

  Returns:
    "mean", "low" and "high": floats, or arrays if a row has many values.

  Raises:
    UserError: A value is NaN or infinite: a run diverged, and whatever would be
      said of the mean would be wrong.
  """
  values = np.asarray(values, np.float64)
  num_runs = len(values)
  is_good = np.isfinite(values).reshape(num_runs, -1).all(axis=1)
  if not is_good.all():
    raise errors.UserError(
        f"{np.count_nonzero(~is_good)} of {num_runs} runs diverged: what"
        " was measured of them is NaN or infinite. Use smaller steps, in a new"
        " workdir."
    )
  has_all = (values > 0).all(axis=0)
  if is_positive:
    values = np.log(np.where(has_all, values, 1))
  # Standard error of the mean, with the deviation of the sample: Student's t
  # allows for its being an estimate.
  error = values.std(axis=0, ddof=1) / np.sqrt(len(values))
  half = t_quantile(len(values) - 1) * error
  mean = values.mean(axis=0)
  parts = dict(mean=mean, low=mean - half, high=mean + half)
  if is_positive:
    parts = {name: np.exp(part) * has_all for name, part in parts.items()}
  parts = {name: np.clip(part, least, most) for name, part in parts.items()}
  if mean.ndim:
    return parts
  return {name: float(value) for name, value in parts.items()}


@functools.cache  # Sixty small programs for one number.
def t_quantile(degrees: int, tail: float = 0.025) -> float:
  """Computes the t that a Student's t exceeds with probability `tail`."""
  low, high = 0.0, 1e3
  for _ in range(60):
    middle = (low + high) / 2
    share = degrees / (degrees + middle**2)
    # P(|t| > x) is the regularized incomplete beta function at n / (n + x^2):
    # no SciPy is needed for one quantile.
    beyond = jax.scipy.special.betainc(degrees / 2, 0.5, share) / 2
    low, high = (middle, high) if beyond > tail else (low, middle)
  return low


def overlap(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
  """Whether two intervals share a value."""
  return one["low"] <= other["high"] and other["low"] <= one["high"]


def rank(value: str, near: Sequence[str]) -> str:
  """Says that something is best, or that it is not apart from others.

  Args:
    value: What it has, as text.
    near: Names of those whose intervals overlap with its own.
  """
  if not near:
    return f"is best with {value}"
  return (
      f"has {value}, and is not apart from {', '.join(near)} (95 % intervals"
      " overlap)"
  )


def text(parts: Mapping[str, float], digits: int = 3) -> str:
  """Writes an interval: mean [low, high]."""
  mean, low, high = (f"{parts[k]:.{digits}f}" for k in ("mean", "low", "high"))
  return f"{mean} [{low}, {high}]"
