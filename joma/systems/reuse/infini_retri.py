"""InfiniRetri: a long text is read in chunks, and the sentences asked for stay.

Each round reads [carried, chunk, question]; the last layer's attention from the
question says which tokens matter,

  score_s = sum over |i| <= (width - 1) / 2, heads n and question rows t of
            weights_n,t,s+i

and the sentences of the best tokens are carried to the next round as tokens, to
be read anew: nothing of keys and values is kept. What is carried at the end is
the text that the question is asked of (https://arxiv.org/abs/2502.12962). Fewer
tokens than `budget`, and the rest of the last sentence, are carried.

Letters: N heads, Q tokens of the question, S tokens of the text.
"""

from collections.abc import Collection
import dataclasses

from jaxtyping import Bool, Float, Int
import numpy as np

from joma.systems.reuse import question_weights
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """How a text is read.

  Attributes:
    chunk: Most new tokens of a round.
    budget: Tokens after which no further sentence is carried.
    width: Of the filter along the text, odd: about that of an answer.
  """

  chunk: int = 512
  budget: int = 300
  width: int = 5

  def __post_init__(self):
    for name in ("chunk", "budget", "width"):
      require.at_least(name, getattr(self, name), 1)
    if self.width % 2 == 0:
      raise errors.UserError(f"width={self.width} must be odd.")


def carried(
    read: question_weights.Read,
    text: Int[np.ndarray, "S"],
    question: Int[np.ndarray, "Q"],
    ends: Collection[int],
    settings: Settings,
) -> Int[np.ndarray, "s"]:
  """Returns the tokens that the question is to be asked of.

  A text of one chunk is returned as it is.

  Args:
    read: As `question_weights.reader` makes it.
    text: To be searched.
    question: What is asked.
    ends: Tokens that end sentences.
    settings: Sizes.
  """
  if len(text) <= settings.chunk:
    return text
  kept = text[:0]
  for chunk in chunks(text, ends, settings.chunk):
    kept = np.concatenate([kept, chunk])
    found = scores(read(kept, question), settings.width)
    kept = kept[keep(found, sentences(kept, ends), settings.budget)]
  return kept


def chunks(
    text: Int[np.ndarray, "S"], ends: Collection[int], size: int
) -> list[Int[np.ndarray, "_"]]:
  """Cuts a text behind sentences; one that is longer than a chunk is cut."""
  found, start = [], 0
  while start < len(text):
    part = text[start : start + size]
    is_end = np.isin(part, list(ends))
    stop = len(part)
    if start + stop < len(text) and is_end.any():
      stop = int(np.flatnonzero(is_end)[-1]) + 1
    found.append(part[:stop])
    start += stop
  return found


def sentences(
    tokens: Int[np.ndarray, "S"], ends: Collection[int]
) -> Int[np.ndarray, "S"]:
  """Number of the sentence of each token; one that ends it is part of it."""
  is_end = np.isin(tokens, list(ends))
  return np.cumsum(is_end) - is_end


def scores(
    weights: Float[np.ndarray, "N Q S"], width: int
) -> Float[np.ndarray, "S"]:
  """Attention to each token and its neighbours, heads and rows together."""
  return np.convolve(weights.sum(axis=(0, 1)), np.ones(width))[
      width // 2 : width // 2 + weights.shape[-1]
  ]


def keep(
    found: Float[np.ndarray, "S"], sentence: Int[np.ndarray, "S"], budget: int
) -> Bool[np.ndarray, "S"]:
  """Marks whole sentences, those of the best tokens first."""
  is_kept = np.zeros(len(found), bool)
  for token in np.argsort(-found, kind="stable"):
    if is_kept.sum() >= budget:
      break
    is_kept |= sentence == sentence[token]
  return is_kept
