"""Heavy hitters: which tokens they will be, and who finds them.

A sequence is read to its middle. Its first h tokens are the candidates, and the
k of them that the queries of the second half attend to most are the heavy
hitters: the best that a cache of k slots could have kept. A predictor ranks the
candidates without having seen the second half; its recall is the share of heavy
hitters among the k that it ranks highest, k / h for one that knows nothing.

Where scores tie, the slots left are shared out evenly among them: recall is
then the expected one under ties that are broken at random, on either side.

Letters: B batch, N heads, T queries and keys, C = h candidates, V vocabulary,
R runs, E steps.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float, Int
import numpy as np


def membership(
    scores: Float[np.ndarray, "*b C"], num_kept: int
) -> Float[np.ndarray, "*b C"]:
  """Computes the probability that each candidate is among the k highest.

  Args:
    scores: Of any scale; ties are broken at random.
    num_kept: k, from 1 to C.

  Returns:
    Numbers in [0, 1] that sum to k: 0 and 1 but for ties with the k-th.
  """
  rank = scores.shape[-1] - num_kept
  limit = np.partition(scores, rank, axis=-1)[..., rank, None]
  above, equal = scores > limit, scores == limit
  free = num_kept - above.sum(axis=-1, keepdims=True)
  return above + equal * free / equal.sum(axis=-1, keepdims=True)


def recall(
    scores: Float[np.ndarray, "*#b C"],
    mass: Float[np.ndarray, "*#b C"],
    num_kept: int,
) -> Float[Any, "*b"]:
  """Computes which share of the k heavy hitters has the k highest scores.

  Args:
    scores: What a predictor says of each candidate.
    mass: Attention that it gets in the second half.
    num_kept: k.

  Returns:
    From 0 to 1; k / C in the mean for scores that know nothing.
  """
  kept = membership(scores, num_kept) * membership(mass, num_kept)
  return kept.sum(axis=-1) / num_kept


def future_mass(
    attn_weights: Float[Any, "*b T T"],
) -> Float[Any, "*b C"]:
  """Sums what the second half of the queries gives to the first half."""
  middle = attn_weights.shape[-1] // 2
  return attn_weights[..., middle:, :middle].sum(axis=-2)


def running_score(
    attn_weights: Float[Any, "*b T T"], *, is_mean: bool = False
) -> Float[Any, "*b C"]:
  """Computes H2O's score (https://arxiv.org/abs/2306.14048) in the middle.

  Args:
    attn_weights: Causal, rows sum to 1.
    is_mean: Divide by the number of queries that could see the token.

  Returns:
    Attention that each candidate got from the queries of the first half.
  """
  middle = attn_weights.shape[-1] // 2
  total = attn_weights[..., :middle, :middle].sum(axis=-2)
  return total / np.arange(middle, 0, -1) if is_mean else total


def mean_by_type(
    mass: Float[np.ndarray, "B N C"],
    tokens: Int[np.ndarray, "B C"],
    vocab_size: int,
) -> Float[np.ndarray, "N V"]:
  """Estimates the future mass of a token from its type alone, for each head.

  What ranks best of all that looks at types only: a ceiling for predictors
  that do. A type's mean is drawn to that of all by one occurrence.
  """
  count = np.bincount(tokens.ravel(), minlength=vocab_size)
  total = [
      np.bincount(tokens.ravel(), head.ravel(), vocab_size)
      for head in mass.swapaxes(0, 1)
  ]
  mean = mass.mean(axis=(0, 2))[:, None]
  return (np.stack(total) + mean) / (count + 1)


def partial_rank_correlation(
    a: Float[np.ndarray, "V"],
    b: Float[np.ndarray, "V"],
    given: Float[np.ndarray, "V"],
) -> float:
  """Correlates the ranks of a and b beyond what those of `given` explain.

  0 where nothing is left to correlate.
  """
  if len(a) < 4:
    return 0.0
  rest_a, rest_b = (_unexplained(values, given) for values in (a, b))
  scale = np.linalg.norm(rest_a) * np.linalg.norm(rest_b)
  return float(rest_a @ rest_b / scale) if scale > 0 else 0.0


def _unexplained(
    values: Float[np.ndarray, "V"], given: Float[np.ndarray, "V"]
) -> Float[np.ndarray, "V"]:
  """What a line through the ranks of `given` leaves of those of `values`."""
  centred = lambda x: _ranks(x) - (len(x) + 1) / 2
  ranks, line = centred(values), centred(given)
  slope = line @ ranks / max(line @ line, 1)
  return ranks - slope * line


def _ranks(values: Float[np.ndarray, "V"]) -> Float[np.ndarray, "V"]:
  """Ranks from low to high; equal values share their mean rank."""
  _, place, count = np.unique(values, return_inverse=True, return_counts=True)
  return (np.cumsum(count) - (count - 1) / 2)[place]


def recalls(
    scores: Mapping[str, Float[np.ndarray, "*_ C"]],
    mass: Float[np.ndarray, "*b C"],
    num_kept: int,
) -> dict[str, float]:
  """Computes each predictor's recall, a mean over sequences and heads.

  Args:
    scores: By predictor, of shapes that broadcast against that of `mass`.
    mass: Attention that each candidate gets in the second half.
    num_kept: k.

  Returns:
    By predictor; `recency`, the last k candidates, and `random` among them.
  """
  num_candidates = mass.shape[-1]
  scores = {
      **scores,
      "recency": np.arange(num_candidates, dtype=np.float64),
      "random": np.zeros(num_candidates),
  }
  return {
      name: float(recall(value, mass, num_kept).mean())
      for name, value in scores.items()
  }


def count_kept(budget: float, num_candidates: int) -> int:
  """k: the budget's share of the candidates, one at least."""
  return max(1, round(budget * num_candidates))


def along_training(
    steps: Sequence[int] | Int[np.ndarray, "E"],
    rows: Sequence[Sequence[Mapping[str, float]]],
    *,
    num_candidates: int,
    num_kept: int,
) -> dict[str, Any]:
  """Lays the recalls of all runs and steps out as curves.

  Args:
    steps: Of the rows.
    rows: Of each run, what `recalls` gives at each step.
    num_candidates: C.
    num_kept: k.

  Returns:
    `steps`, `num_candidates`, `num_kept`, `chance` and `recall`, which holds
    [R, E] by predictor.
  """
  return {
      "steps": np.asarray(steps),
      "num_candidates": num_candidates,
      "num_kept": num_kept,
      "chance": num_kept / num_candidates,
      "recall": {
          name: np.array([[row[name] for row in run] for run in rows])
          for name in rows[0][0]
      },
  }
