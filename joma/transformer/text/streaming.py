"""Ids to text as they come, piece by piece."""

from collections.abc import Iterable, Iterator, Mapping
import math
import operator
import os
from typing import Any, SupportsIndex

from joma.transformer.text import tokenizer as tokenizer_lib
from scansnap_jax.experiment import errors

# What stands for bytes that are no text, or not yet.
_REPLACEMENT = "\ufffd"


class StreamDecoder:
  """Turns ids into text piece by piece; no character is ever cut.

  The pieces, `finish` included, make what `decode` gives of all ids of a text
  at once. What later ids may change is held back: the end of a character that
  may lack bytes, and tokens of single bytes as long as more of them come, for
  one that is no UTF-8 makes replacement characters of all its neighbours. So is
  the end of a text in which a decoder replaces more than a character at a time.
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
    is_bpe = isinstance(tokenizer, tokenizer_lib.Bpe)
    self._reach = _reach(tokenizer.decoder) if is_bpe else 0.0
    # Ids that decide the next piece, and how much of their text is out. The
    # first group of them is context: decoders treat the start of a text apart.
    self._context = [operator.index(token) for token in prompt_ids]
    self._pending: list[int] = []
    self._shown = self._text_of(self._context) or ""
    self._is_at_prompt = bool(self._context)

  def push(self, *ids: SupportsIndex) -> str:
    """Takes ids that come next and returns the text that is now certain."""
    self._pending += map(operator.index, ids)
    text = self._text_of([*self._context, *self._pending])
    if text is None:
      return ""
    certain = self._certain(text)
    piece = self._advance(certain)
    if piece and certain == text and not self._reach:
      self._forget()
    return piece

  def finish(self) -> str:
    """Returns what was held back, incomplete as it is."""
    return self._advance(self._decode())

  def _forget(self) -> None:
    """Keeps of the ids that were given out the last ones, as context."""
    shown = self._text_of(self._pending)
    if shown is not None:
      self._context, self._pending = self._pending, []
      self._shown = shown

  def _text_of(self, ids: list[int]) -> str | None:
    """Their text; None where they have none alone, but may with more of them.

    A decoder that strips the end panics where nothing is left to strip.
    """
    try:
      return self._tokenizer.decode(ids) if ids else ""
    except errors.UserError:
      return None

  def _decode(self, *more: int) -> str:
    return self._tokenizer.decode([*self._context, *self._pending, *more])

  def _certain(self, text: str) -> str:
    """Returns what of a text no id can change that may come."""
    spoiler = self._tokenizer.spoiler
    if spoiler is not None:
      text = os.path.commonprefix([text, self._decode(spoiler)])
    if self._reach:
      text = text[: len(text) - int(min(self._reach, len(text)))]
    # All of them: some decoders show a run of bytes so while its end is open.
    return text.rstrip(_REPLACEMENT)

  def _advance(self, text: str) -> str:
    if self._shown.startswith(text):
      return ""
    if not text.startswith(self._shown):
      text = self._after_other(text)
    piece = text[len(self._shown) :]
    self._shown, self._is_at_prompt = text, False
    return piece

  def _after_other(self, text: str) -> str:
    """Returns the text to go on with where it is no longer what was shown."""
    common = os.path.commonprefix([self._shown, text])
    is_open = common == self._shown.rstrip(_REPLACEMENT)
    if self._is_at_prompt and not is_open:
      # Bytes that spoil those of the prompt, which stands as it is.
      self._context, self._shown = [], ""
      return self._decode()
    self._shown = common  # A character that began in the prompt is whole now.
    return text


def _reach(decoder: Mapping[str, Any]) -> float:
  """Characters of a text's end that a decoder may change as more ids come.

  Most decoders join tokens one by one. Behind a step that makes one text of
  them, patterns of several characters are found across tokens; a start that is
  cut by more than a character may take from several.
  """
  found, is_one = 0.0, False
  for step in _steps(decoder):
    kind = step.get("type")
    is_one |= kind == "Fuse"
    if kind == "Replace" and is_one:
      pattern = step["pattern"].get("String")
      found += math.inf if pattern is None else max(len(pattern) - 1, 0)
    elif kind == "Strip" and step["start"] > 1:
      found += 1
  return found


def _steps(decoder: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
  if decoder.get("type") != "Sequence":
    yield decoder
    return
  for step in decoder["decoders"]:
    yield from _steps(step)


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
