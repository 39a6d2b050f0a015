"""Tokens leave and stay in chunks that follow each other in the text.

Letters: B batch, K key and value heads, C slots.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Int, Num

from joma.inference.cache import policy as policy_lib
from joma.inference.cache import rules
from joma.inference.cost import cache_plan
from joma.systems.cache_policies import chunks
from scansnap_jax.experiment import errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkKV(policy_lib.Policy):
  """What a prompt's last queries gave, summed over chunks (arXiv 2502.00299).

  The text is cut into chunks of the same size; all tokens of a chunk are worth
  the sum of what its kept tokens got, so that a chunk of which one token has
  left is worth less, and the others follow.

  The paper stops evicting after the prompt. Here the score goes on as a mean
  with the window's length as its memory, as with SnapKV. Layers do not share
  what they keep.

  Attributes:
    chunk_size: Tokens of a chunk.
    window: The last queries of a prompt, which stay themselves.
  """

  label: ClassVar[str] = "ChunkKV"
  uses_queries: ClassVar[bool] = True
  estimates_attention: ClassVar[bool] = True
  chunk_size: int = 10
  window: int = 32

  def __post_init__(self):
    super().__post_init__()
    for name in ("chunk_size", "window"):
      if getattr(self, name) < 1:
        raise errors.UserError(
            f"{name}={getattr(self, name)} must be at least 1."
        )

  def default_recent(self, capacity: int) -> int:
    return self.window

  def fitted(self, slots: int, named: frozenset[str]) -> policy_lib.Policy:
    """The window is at most half of the slots."""
    if "window" in named:
      return self
    window = max(1, min(self.window, slots // 2))
    return dataclasses.replace(self, window=window)

  def plan(
      self, capacities: tuple[int, ...], name: str
  ) -> cache_plan.CachePlan:
    """Only the last queries of a prompt are summed."""
    return cache_plan.scored(capacities, name, self.window)

  def read_prompt(self, prompt: policy_lib.Prompt) -> rules.Prompted:
    attn_weights, rows = prompt.last_weights(self.window)
    num_rows = jnp.maximum((rows >= 0).sum(-1), 1)[:, None, None]
    return attn_weights.sum(axis=3).mean(axis=2) / num_rows, None, None

  def observe(
      self, slots: policy_lib.Slots, step: policy_lib.Step
  ) -> rules.Observed:
    given = step.attn_weights.mean(axis=2)
    score = slots.score + (given - slots.score) / self.window
    return score, slots.aux, slots.state

  def priority(
      self, slots: policy_lib.Slots, position: Int[Array, "B"]
  ) -> Num[Array, "B K C"]:
    del position
    return chunks.sums(slots.score, slots.pos, self.chunk_size)
