"""Everything stays.

Letters: B batch, K key and value heads, C slots.
"""

import dataclasses
from typing import ClassVar

from joma.inference.cache import policy as policy_lib
from joma.inference.cost import cache_plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Full(policy_lib.Policy):
  """Nothing leaves; a token too many makes the output NaN, not a window."""

  num_recent: int | None = 0
  evicts: ClassVar[bool] = False

  def plan(
      self, capacities: tuple[int, ...], name: str
  ) -> cache_plan.CachePlan:
    """A slot has no score and needs no position."""
    del capacities, name
    return cache_plan.full()
