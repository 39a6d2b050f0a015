"""Five published programs named H2O: five algorithms, in plain NumPy.

The repository of the paper (arXiv 2306.14048) evicts by different rules in its
different scripts, so numbers made with one do not speak of another. Here each
says which keys a decode step sees, given the attention logits of a text read
with a full cache. `h2o.H2O` is `real_drop`.

Letters: N heads, T tokens, P tokens of the prompt, h heavy and r recent keys.
"""

import numpy as np


def real_drop(
    attn_logits: np.ndarray, num_prompt: int, num_heavy: int, num_recent: int
) -> np.ndarray:
  """The paper's algorithm: what has left is gone.

  A step attends to the kept keys and itself, adds its weights to their scores,
  and drops the least outside of the last r when there are more than h + r.

  Args:
    attn_logits: [N, T, T]; what lies above the diagonal is not read.
    num_prompt: P, at least h + r.
    num_heavy: h.
    num_recent: r.

  Returns:
    Bool [N, T - P, T]: the keys that query P + t sees.
  """
  return _running(attn_logits, num_prompt, num_heavy, num_recent)


def flexgen(
    attn_logits: np.ndarray, num_prompt: int, num_heavy: int
) -> np.ndarray:
  """The offloading engine's: slots replaced in place, scores of float16.

  Of 2 h slots the h - 1 newest are protected; the least of the others makes
  room before the new token attends. See `real_drop` for the arguments.
  """
  return _running(
      attn_logits,
      num_prompt,
      num_heavy,
      num_heavy - 1,
      size=2 * num_heavy - 1,
      score_type=np.float16,
  )


def hf_mask(
    attn_logits: np.ndarray, num_prompt: int, num_heavy: int, num_recent: int
) -> np.ndarray:
  """The masked Hugging Face script: nothing is freed, and some come back.

  The heavy keys of a step are chosen a step earlier, from all but the last r
  then: the key that leaves the window in between can be seen by neither rule,
  keeps its score, and may be chosen for the next step. See `real_drop`.
  """
  num_heads, length, _ = attn_logits.shape
  visible = np.zeros((num_heads, length - num_prompt, length), bool)
  for head, logits in enumerate(attn_logits):
    score = _prompt_scores(logits, num_prompt)
    for t in range(num_prompt, length):
      candidates = np.arange(t - num_recent)
      heavy = _greatest(score[candidates], num_heavy)
      score[np.setdiff1d(candidates, heavy)] = 0.0
      seen = visible[head, t - num_prompt]
      seen[heavy] = True
      seen[t + 1 - num_recent : t + 1] = True
      score[seen] += _softmax(logits[t, seen])
  return visible


def lmeval_llama(
    attn_logits: np.ndarray, num_prompt: int, num_heavy: int, num_recent: int
) -> np.ndarray:
  """The harness script for LLaMA: it has seen the future.

  One set of heavy keys for all rows, by column sums over the whole text, later
  queries included, and all keys at a distance of at most r. See `real_drop`.
  """
  num_heads, length, _ = attn_logits.shape
  visible = np.zeros((num_heads, length, length), bool)
  distance = np.arange(length)[:, None] - np.arange(length)
  for head, logits in enumerate(attn_logits):
    heavy = _greatest(_prompt_scores(logits, length), num_heavy)
    visible[head][:, heavy] = True
    visible[head] |= np.abs(distance) <= num_recent
    visible[head] &= distance >= 0
  return visible[:, num_prompt:]


def lmeval_opt(
    attn_logits: np.ndarray, num_prompt: int, num_heavy: int, num_recent: int
) -> np.ndarray:
  """The harness script for OPT and NeoX: a pool that forgets.

  h - 1 keys and the query's own are the pool, whatever the window holds; who
  is not among them starts again from 0, though it may still be in the window.
  Scores are of the full softmax. See `real_drop`.
  """
  num_heads, length, _ = attn_logits.shape
  visible = np.zeros((num_heads, length - num_prompt, length), bool)
  for head, logits in enumerate(attn_logits):
    score, pool = np.zeros(length), np.arange(0)
    for t in range(length):
      if t >= num_prompt:
        seen = visible[head, t - num_prompt]
        seen[pool] = True
        seen[max(t + 1 - num_recent, 0) : t + 1] = True
      score[: t + 1] += _softmax(logits[t, : t + 1])
      pool = _greatest(score[: t + 1], num_heavy - 1)
      score[np.setdiff1d(np.arange(t + 1), pool)] = 0.0
  return visible


def _running(
    attn_logits: np.ndarray,
    num_prompt: int,
    num_heavy: int,
    num_recent: int,
    size: int | None = None,
    score_type: type[np.floating] = np.float64,
) -> np.ndarray:
  """`size` keys stay besides the new one; None is h + r."""
  size = num_heavy + num_recent if size is None else size
  num_heads, length, _ = attn_logits.shape
  visible = np.zeros((num_heads, length - num_prompt, length), bool)
  for head, logits in enumerate(attn_logits):
    score = _prompt_scores(logits, num_prompt).astype(score_type)
    recent = np.arange(num_prompt - num_recent, num_prompt)
    heavy = _greatest(score[: num_prompt - num_recent], size - num_recent)
    kept = [*heavy, *recent]
    for t in range(num_prompt, length):
      kept.append(t)
      visible[head, t - num_prompt, kept] = True
      given = _softmax(logits[t, kept]).astype(score_type)
      score[kept] = score[kept] + given
      may_leave = [j for j in kept if j <= t - num_recent]
      kept.remove(min(may_leave, key=lambda j: score[j]))
  return visible


def _prompt_scores(logits: np.ndarray, num_prompt: int) -> np.ndarray:
  """Column sums of the first P rows."""
  score = np.zeros(len(logits))
  for t in range(num_prompt):
    score[: t + 1] += _softmax(logits[t, : t + 1])
  return score


def _greatest(score: np.ndarray, count: int) -> np.ndarray:
  return np.sort(np.argsort(-score, kind="stable")[: max(count, 0)])


def _softmax(logits: np.ndarray) -> np.ndarray:
  unnormalized = np.exp(logits - logits.max())
  return unnormalized / unnormalized.sum()
