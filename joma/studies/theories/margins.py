"""Matrices of least norm that tell chosen tokens from others by a margin of 1.

  minimize |W|   such that   (x_chosen - x_t)^T W z >= 1   for all other tokens

With the Frobenius norm it is the support vector machine of attention, with the
nuclear norm that of a product of key and query (https://arxiv.org/abs/2308.16898).

Letters: C constraints, D width, N inputs, T tokens.
"""

from jaxtyping import Float, Int
import numpy as np
from scipy import optimize

# Soft threshold of the nuclear norm's proximal step: any positive one leads to
# the same matrix, this one soon.
_THRESHOLD = 0.3


def constraints(
    tokens: Float[np.ndarray, "N T D"],
    queries: Float[np.ndarray, "N D"],
    chosen: Int[np.ndarray, "N"],
) -> Float[np.ndarray, "C D D"]:
  """Matrices A_c, so that each margin is <A_c, W>: C = N (T - 1)."""
  rows = np.arange(len(tokens))
  gaps = tokens[rows, chosen][:, None] - tokens
  others = np.arange(tokens.shape[1])[None] != chosen[:, None]
  return np.einsum("CD,CE->CDE", gaps[others], queries[np.where(others)[0]])


def frobenius(
    margins: Float[np.ndarray, "C D D"],
) -> Float[np.ndarray, "D D"]:
  """The matrix of least Frobenius norm."""
  return _project(margins, np.zeros(margins.shape[1:]))


def nuclear(
    margins: Float[np.ndarray, "C D D"], num_steps: int = 300
) -> Float[np.ndarray, "D D"]:
  """A matrix of least nuclear norm, by Douglas-Rachford splitting."""
  state = np.zeros(margins.shape[1:])
  for _ in range(num_steps):
    found = _project(margins, state)
    left, values, right = np.linalg.svd(2 * found - state)
    values = np.maximum(values - _THRESHOLD, 0)
    state = state + (left * values) @ right - found
  return _project(margins, state)


def _project(
    margins: Float[np.ndarray, "C D D"], start: Float[np.ndarray, "D D"]
) -> Float[np.ndarray, "D D"]:
  """The nearest matrix with all margins at least 1.

  Least distance programming (Lawson and Hanson, Solving Least Squares Problems,
  chapter 23): nonnegative least squares of the transposed problem.
  """
  rows = margins.reshape(len(margins), -1)
  missing = 1 - rows @ start.ravel()
  if missing.max() <= 0:
    return start
  system = np.vstack([rows.T, missing[None]])
  target = np.append(np.zeros(rows.shape[1]), 1.0)
  weights, _ = optimize.nnls(system, target, maxiter=100 * len(rows))
  rest = system @ weights - target
  return start - (rest[:-1] / rest[-1]).reshape(start.shape)
