"""The last tokens, with or without the first ones.

Letters: B batch, K key and value heads, C slots.
"""

import dataclasses

from joma.inference.cache import policy as policy_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window(policy_lib.Policy):
  """The last C tokens."""

  num_recent: int | None = 0

  def priority(self, slots, position):
    return slots.pos


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamingLLM(Window):
  """First tokens, attention's sinks, and a window (arXiv 2309.17453).

  The paper counts positions within the cache: `kv_cache.init(...,
  positions="rolled")`.
  """

  num_sinks: int = 4
