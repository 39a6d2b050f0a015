"""The last tokens, with or without the first ones.

Letters: B batch, K key and value heads, C slots.
"""

import dataclasses
from typing import Any, ClassVar

from jaxtyping import Array, Int, Num

from joma.inference.cache import policy as policy_lib
from joma.inference.cost import cache_plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window(policy_lib.Policy):
  """The last C tokens."""

  label: ClassVar[str] = ""
  look: ClassVar[policy_lib.Look | None] = ("#7A7A7A", "v", "-")
  num_recent: int | None = 0

  def plan(
      self, capacities: tuple[int, ...], name: str
  ) -> cache_plan.CachePlan:
    """Places decide: a step changes no score."""
    return cache_plan.window(capacities, name)

  def kernel_options(self) -> dict[str, Any]:
    return {
        "num_sinks": self.num_sinks,
        "num_recent": self.num_recent,
        "score": "position",
    }

  def priority(
      self, slots: policy_lib.Slots, position: Int[Array, "B"]
  ) -> Num[Array, "B K C"]:
    return slots.pos


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamingLLM(Window):
  """First tokens, attention's sinks, and a window (arXiv 2309.17453).

  The paper counts positions within the cache: `kv_cache.init(...,
  positions="rolled")`.

  Paper's settings: 4 sinks, a window of 1,020 beside them in Llama 2, positions
  as in the cache.
  """

  label: ClassVar[str] = "StreamingLLM"
  look: ClassVar[policy_lib.Look | None] = ("#E69F00", "D", "-")
  num_sinks: int = 4
