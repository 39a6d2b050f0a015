"""Ids to text as they come, piece by piece."""

from collections.abc import Iterable, Iterator
import operator
from typing import SupportsIndex

from joma.transformer.text import tokenizer as tokenizer_lib

# What stands for bytes that are no text, or not yet.
_REPLACEMENT = "\ufffd"


class StreamDecoder:
  """Turns ids into text piece by piece; no character is ever cut.

  The pieces, `finish` included, make what `decode` gives of all ids of a text
  at once. What ends in a character that may lack bytes is held back.
  """

  def __init__(
      self,
      tokenizer: tokenizer_lib.Tokenizer,
      prompt_ids: tokenizer_lib.Ids = (),
  ):
    """Starts behind the ids of a prompt, whose text is not given out again.

    Args:
      tokenizer: Of the ids.
      prompt_ids: What comes before the first id that is pushed: decoders treat
        the start of a text apart, as by dropping its first space.
    """
    self._tokenizer = tokenizer
    # Ids that decide the next piece, and how much of their text is out. The
    # first group of them is context: decoders treat the start of a text apart.
    self._context = [operator.index(token) for token in prompt_ids]
    self._pending: list[int] = []
    text = tokenizer.decode(self._context) if self._context else ""
    self._sent = len(text.rstrip(_REPLACEMENT))

  def push(self, *ids: SupportsIndex) -> str:
    """Takes ids that come next and returns the text that is now certain."""
    self._pending += map(operator.index, ids)
    text = self._tokenizer.decode(self._context + self._pending)
    # All of them: some decoders show a run of bytes so while its end is open.
    certain = text.rstrip(_REPLACEMENT)
    piece = self._advance(certain)
    if piece and certain == text:
      self._context, self._pending = self._pending, []
      self._sent = len(self._tokenizer.decode(self._context))
    return piece

  def finish(self) -> str:
    """Returns what was held back, incomplete as it is."""
    return self._advance(self._tokenizer.decode(self._context + self._pending))

  def _advance(self, text: str) -> str:
    piece = text[self._sent :]
    self._sent = max(self._sent, len(text))
    return piece


def stream_decode(
    tokenizer: tokenizer_lib.Tokenizer,
    ids: Iterable[SupportsIndex],
    prompt_ids: tokenizer_lib.Ids = (),
) -> Iterator[str]:
  """Yields the text of ids as they come, in pieces that are not empty.

  Args:
    tokenizer: Of the ids.
    ids: What is new.
    prompt_ids: What stands before, see `StreamDecoder`.
  """
  decoder = StreamDecoder(tokenizer, prompt_ids)
  for token in ids:
    if piece := decoder.push(token):
      yield piece
  if piece := decoder.finish():
    yield piece
