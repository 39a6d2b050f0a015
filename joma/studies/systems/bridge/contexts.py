"""Where the samples of a rung come from: a context, its query, the next token.

Scan & Snap (https://arxiv.org/abs/2305.16380) draws a class, a query and a next
token, and then its context, token by token, from P(l|n). A text has all of this
as well. In between lies the text with its contexts resampled: query and next
token as they follow each other in the text, and every token of the context from
another place in front of the same next token. That leaves P(m, n) and P(l|n)
those of the text and takes everything else away.

Letters: B samples, C tokens of a context, M tokens of the vocabulary.
"""

from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Bool, Int, Integer
import numpy as np

from scansnap_jax import config as scansnap_config
from scansnap_jax import data as data_lib


class Samples(NamedTuple):
  """Samples of a source.

  Attributes:
    context: Tokens in front of the query, in their order.
    query: The token that asks.
    label: The token that follows.
  """

  context: Int[np.ndarray, "*b C"]
  query: Int[np.ndarray, "*b"]
  label: Int[np.ndarray, "*b"]


@runtime_checkable
class Source(Protocol):
  """Draws samples."""

  @property
  def num_tokens(self) -> int:
    """M."""
    ...

  def draw(self, rng: np.random.Generator, num: int, length: int) -> Samples:
    """Draws `num` samples with contexts of `length` tokens."""
    ...


class Classes:
  """Scan & Snap's classes: two next tokens for each of three queries."""

  def __init__(self):
    config = scansnap_config.DataConfig(num_next_per_last=2)
    self._classes = data_lib.make_classes(config, 3)
    self._cdf = np.cumsum(self._classes.probs, axis=1)

  @property
  def num_tokens(self) -> int:
    """M."""
    return self._classes.num_tokens

  def draw(self, rng: np.random.Generator, num: int, length: int) -> Samples:
    """Draws classes, then their tokens."""
    index = rng.integers(self._classes.num_classes, size=num)
    place = rng.random((num, length))
    context = np.empty((num, length), np.int32)
    for n, cdf in enumerate(self._cdf):
      rows = index == n
      found = np.searchsorted(cdf / cdf[-1], place[rows], side="right")
      context[rows] = found
    query, label = (
        ids[index].astype(np.int32)
        for ids in (self._classes.query, self._classes.label)
    )
    return Samples(context, query, label)


class Text:
  """Places of a text."""

  def __init__(
      self,
      tokens: Integer[np.ndarray, "_"],
      num_tokens: int,
      *,
      allowed: Bool[np.ndarray, "M M"] | None = None,
      is_resampled: bool = False,
  ):
    """Looks up all places.

    Args:
      tokens: Of the text.
      num_tokens: M.
      allowed: Next tokens (columns) of each query (rows) that are drawn; None
        allows all.
      is_resampled: Take the tokens of a context from different places in front
        of the same next token.
    """
    self._tokens = np.asarray(tokens).astype(np.int32)
    self._num_tokens = num_tokens
    self._is_resampled = is_resampled
    pairs = self._tokens[:-1], self._tokens[1:]
    is_allowed = np.ones(len(pairs[0]), bool)
    if allowed is not None:
      is_allowed = allowed[pairs]
    self._places = np.flatnonzero(is_allowed)  # Of queries.

  @property
  def num_tokens(self) -> int:
    """M."""
    return self._num_tokens

  def draw(self, rng: np.random.Generator, num: int, length: int) -> Samples:
    """Draws places, whose tokens in front are the context, or are resampled."""
    first = np.searchsorted(self._places, length)
    places = self._places[first:]
    drawn = rng.choice(places, num)
    label = self._tokens[drawn + 1]
    offsets = np.arange(length, 0, -1)
    around = np.repeat(drawn[:, None], length, axis=1)
    if self._is_resampled:
      order = places[np.argsort(self._tokens[places + 1], kind="stable")]
      sorted_labels = self._tokens[order + 1]
      low, high = (
          np.searchsorted(sorted_labels, label, side=side)[:, None]
          for side in ("left", "right")
      )
      around = order[rng.integers(low, high, size=(num, length))]
      offsets = rng.integers(1, length + 1, size=(num, length))
    return Samples(self._tokens[around - offsets], self._tokens[drawn], label)


def most_frequent_next(
    tokens: Integer[np.ndarray, "_"], num_tokens: int, num_next: int
) -> Bool[np.ndarray, "M M"]:
  """Marks the most frequent next tokens (columns) of each query (rows)."""
  tokens = np.asarray(tokens).astype(np.int64)
  pairs = tokens[:-1] * num_tokens + tokens[1:]
  count = np.bincount(pairs, minlength=num_tokens**2)
  count = count.reshape(num_tokens, num_tokens)
  order = np.argsort(-count, axis=1, kind="stable")[:, :num_next]
  marks = np.zeros(count.shape, bool)
  np.put_along_axis(marks, order, True, axis=1)
  return marks & (count > 0)
