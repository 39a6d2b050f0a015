"""Tokens leave and stay in chunks that follow each other in the text.

Letters: B batch, K key and value heads, C slots.
"""

import dataclasses
from typing import ClassVar

from jaxtyping import Array, Int, Num

from joma.inference.cache import policy as policy_lib
from joma.inference.cache import rules
from joma.systems.cache_policies import chunks
from joma.systems.cache_policies import last_queries
from scansnap_jax.experiment import errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkKV(last_queries.KeptWindow):
  """What a prompt's last queries gave, summed over chunks (arXiv 2502.00299).

  The text is cut into chunks of the same size; all tokens of a chunk are worth
  the sum of what its kept tokens got, so that a chunk of which one token has
  left is worth less, and the others follow.

  The paper stops evicting after the prompt. Here the score goes on as a mean
  with the window's length as its memory, as with SnapKV. Layers do not share
  what they keep.

  Paper's settings: chunks of 10 tokens.

  Attributes:
    chunk_size: Tokens of a chunk.
    window: The last queries of a prompt, which stay themselves.
  """

  label: ClassVar[str] = "ChunkKV"
  chunk_size: int = 10

  def __post_init__(self):
    super().__post_init__()
    if self.chunk_size < 1:
      raise errors.UserError(
          f"chunk_size={self.chunk_size} must be at least 1."
      )

  def read_prompt(self, prompt: policy_lib.Prompt) -> rules.Prompted:
    return last_queries.of_prompt(prompt, self.window)

  def observe(
      self, slots: policy_lib.Slots, step: policy_lib.Step
  ) -> rules.Observed:
    return last_queries.of_step(slots, step, self.window)

  def priority(
      self, slots: policy_lib.Slots, position: Int[Array, "B"]
  ) -> Num[Array, "B K C"]:
    del position
    return chunks.sums(slots.score, slots.pos, self.chunk_size)
