"""What a question at the end of a prompt gave, each query's share made equal.

Letters: B batch, K key and value heads, C slots.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from joma.inference.cache import policy as policy_lib
from joma.inference.cache import rules
from joma.inference.cost import cache_plan
from scansnap_jax.experiment import errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finch(policy_lib.Policy):
  """A prompt's last queries, times how many tokens each could see (FINCH).

  A query that sees n tokens gives each 1 / n in the mean: times n, all queries
  count alike, wherever they stand (TACL 2024, 10.1162/tacl_a_00716). As with
  SnapKV the queries are those of the question, which stay themselves; nothing
  is smoothed along the text.

  The paper reads a long context chunk by chunk, what was kept of earlier chunks
  before each: that is a prompt in pieces, each with its question. It numbers
  kept tokens anew, as `positions="rolled"` does here, and stops after the
  prompt; here the score goes on as a mean with the window's length as its
  memory.

  Attributes:
    window: Tokens of the question, the last of the prompt.
  """

  label: ClassVar[str] = "FINCH"
  uses_queries: ClassVar[bool] = True
  estimates_attention: ClassVar[bool] = True
  window: int = 32

  def __post_init__(self):
    super().__post_init__()
    if self.window < 1:
      raise errors.UserError(f"window={self.window} must be at least 1.")

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
    num_seen = jnp.maximum(rows + 1, 0)[:, None, None, :, None]
    given = (attn_weights * num_seen).sum(axis=3).mean(axis=2)
    return given / num_rows, None, None

  def observe(
      self, slots: policy_lib.Slots, step: policy_lib.Step
  ) -> rules.Observed:
    num_seen = (slots.pos >= 0).sum(axis=-1, keepdims=True)
    given = step.attn_weights.mean(axis=2) * num_seen
    score = slots.score + (given - slots.score) / self.window
    return score, slots.aux, slots.state
