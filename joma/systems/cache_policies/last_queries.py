"""What a prompt's last queries gave, then a mean with as long a memory.

Letters: B batch, T tokens of a prompt, K key and value heads, G query heads of
each, C slots.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from joma.inference.cache import policy as policy_lib
from joma.inference.cache import rules
from joma.inference.cost import cache_plan
from scansnap_jax.experiment import errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class LastQueries(policy_lib.Policy):
  """Remembers as many queries as its window is long.

  Attributes:
    window: Queries that `of_prompt` and `of_step` remember.
  """

  uses_queries: ClassVar[bool] = True
  window: int = 32

  def __post_init__(self):
    super().__post_init__()
    if self.window < 1:
      raise errors.UserError(f"window={self.window} must be at least 1.")

  def fitted(self, slots: int, named: frozenset[str]) -> policy_lib.Policy:
    """The window is at most half of the slots."""
    if "window" in named:
      return self
    window = max(1, min(self.window, slots // 2))
    return dataclasses.replace(self, window=window)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeptWindow(LastQueries):
  """The last queries' own tokens stay; priorities are in units of attention."""

  estimates_attention: ClassVar[bool] = True

  def default_recent(self, capacity: int) -> int:
    """The window."""
    return self.window

  def plan(
      self, capacities: tuple[int, ...], name: str
  ) -> cache_plan.CachePlan:
    """Only the last queries of a prompt are summed."""
    return cache_plan.scored(capacities, name, self.window)


def of_prompt(prompt: policy_lib.Prompt, window: int) -> rules.Prompted:
  """Returns the mean over the last queries and their heads, [B, K, T]."""
  attn_weights, rows = prompt.last_weights(window)
  num_rows = jnp.maximum((rows >= 0).sum(-1), 1)[:, None, None]
  return attn_weights.sum(axis=3).mean(axis=2) / num_rows, None, None


def of_step(
    slots: policy_lib.Slots, step: policy_lib.Step, window: int
) -> rules.Observed:
  """Returns a mean with the window's length as its memory, [B, K, C]."""
  given = step.attn_weights.mean(axis=2)
  score = slots.score + (given - slots.score) / window
  return score, slots.aux, slots.state
