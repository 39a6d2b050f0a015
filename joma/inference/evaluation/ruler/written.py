"""Examples as token ids: what is compressed, and what is asked on top.

Context and question are encoded apart, so that the cache that is compressed
does not depend on the question.
"""

from typing import NamedTuple

from jaxtyping import Int
import numpy as np

from joma.inference.evaluation import filler
from joma.inference.evaluation.ruler import sample as sample_lib
from joma.transformer.text import chat_template
from joma.transformer.text import tokenizer as tokenizer_lib

# Stands for the user's message while a template is asked what is around it.
_MESSAGE = "the message of the user"


class Written(NamedTuple):
  """An example as ids.

  Attributes:
    context: Of the text, special tokens before it.
    question: Of all that follows.
  """

  context: Int[np.ndarray, "T"]
  question: Int[np.ndarray, "Q"]

  @property
  def num_tokens(self) -> int:
    """T + Q."""
    return len(self.context) + len(self.question)


class Writer:
  """Encodes examples, in a user's message where a template is given."""

  def __init__(
      self,
      tokenizer: tokenizer_lib.Tokenizer,
      template: chat_template.ChatTemplate | None = None,
  ):
    """Asks the template what it writes around a message.

    Args:
      tokenizer: Of the model.
      template: Of its folder; None reads texts as they are.

    Raises:
      UserError: The template fails.
    """
    self._tokenizer = tokenizer
    self._head = self._tail = ""
    self._is_chat = template is not None
    self._front = filler.Encoder(tokenizer).front
    if template is not None:
      said = template.render([{"role": "user", "content": _MESSAGE}])
      self._head, _, self._tail = said.partition(_MESSAGE)

  def write(self, sample: sample_lib.Sample) -> Written:
    """Returns the ids of an example."""
    context = self._encode(self._head + sample.context)
    if not self._is_chat:  # A template writes special tokens itself.
      context = np.concatenate([self._front, context]).astype(np.int32)
    # The assistant's turn begins as the answer does.
    prefix = sample.prefix.lstrip() if self._is_chat else sample.prefix
    question = self._encode(sample.question + self._tail + prefix)
    return Written(context, question)

  def count(self, sample: sample_lib.Sample) -> int:
    """Returns the tokens of an example."""
    return self.write(sample).num_tokens

  def _encode(self, text: str) -> Int[np.ndarray, "T"]:
    return self._tokenizer.encode(text, special=False)
