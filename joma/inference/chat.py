"""A chat: messages by a model's template, of which each is read once.

What the template makes of all messages begins, as a rule, with what the cache
has read; then only the rest is read. A template that writes earlier messages in
another way (drops what the assistant thought, trims spaces) is followed: the
chat is then read again from its beginning.
"""

from collections.abc import Callable, Iterator

import numpy as np

from joma.inference import conversation as conversations
from joma.transformer.text import chat_template
from joma.transformer.text import streaming
from joma.transformer.text import tokenizer as tokenizers

# A conversation in which nothing has been said, with room for so many tokens.
Begin = Callable[[int], conversations.Conversation]


class Chat:
  """Messages of a user and answers of a model.

  Attributes:
    messages: So far, each with `role` and `content`.
    num_read: Tokens that the last message made the model read.
  """

  def __init__(
      self,
      begin: Begin,
      template: chat_template.ChatTemplate,
      tokenizer: tokenizers.Tokenizer,
      eos_ids: tuple[int, ...],
  ):
    """Starts without messages.

    Args:
      begin: Makes conversations.
      template: The model's.
      tokenizer: The model's.
      eos_ids: Tokens that end an answer, which its text does not show.
    """
    self.messages: list[dict[str, str]] = []
    self.num_read = 0
    self._begin = begin
    self._template = template
    self._tokenizer = tokenizer
    self._eos_ids = eos_ids
    self._conversation: conversations.Conversation | None = None
    # What the conversation holds, as a text.
    self._said = ""

  def ask(self, text: str, max_new_tokens: int) -> Iterator[str]:
    """Yields the answer to a message, in pieces that are not empty.

    Args:
      text: The user's message.
      max_new_tokens: Of the answer, at most.

    Raises:
      UserError: The template refuses the message, or the tokenizer, or
        `generate.stream` does. The chat then stands where it stood.
    """
    message = {"role": "user", "content": text}
    rendered = self._template.render([*self.messages, message])
    conversation, ids = self._unread(rendered, max_new_tokens)
    tokens = conversation.say(ids, max_new_tokens)
    # Now nothing refuses it any more.
    self._conversation = conversation
    self.messages.append(message)
    self.num_read = len(ids)
    answer = []
    visible = (token for token in tokens if token not in self._eos_ids)
    try:
      for piece in streaming.stream_decode(self._tokenizer, visible, ids):
        answer.append(piece)
        yield piece
    finally:
      said = "".join(answer)
      self._said = rendered + said
      self.messages.append({"role": "assistant", "content": said})

  def _unread(
      self, rendered: str, max_new_tokens: int
  ) -> tuple[conversations.Conversation, np.ndarray]:
    """Returns the conversation that goes on, and the ids of what is new."""
    conversation = self._conversation
    if conversation is not None and rendered.startswith(self._said):
      ids = self._encode(rendered[len(self._said) :])
      waiting = conversation.waiting
      if waiting and waiting[0] in self._eos_ids:
        # The template writes the end of an answer itself, or leaves it out.
        conversation.forget_waiting()
      if len(ids) and conversation.has_room(len(ids) + max_new_tokens):
        return conversation, ids
    ids = self._encode(rendered)
    return self._begin(len(ids) + max_new_tokens), ids

  def _encode(self, text: str) -> np.ndarray:
    """The template writes special tokens itself."""
    return self._tokenizer.encode(text, special=False)
