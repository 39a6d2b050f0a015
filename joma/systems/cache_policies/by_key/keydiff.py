"""Keys that differ from the mean direction stay.

Letters: B batch, T tokens of a prompt, K key and value heads, G query heads of
each, C slots, H head size.
"""

import dataclasses
from typing import ClassVar

from jaxtyping import Array, Int, Num

from joma.inference.cache import policy as policy_lib
from joma.systems.cache_policies.by_key import directions


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyDiff(policy_lib.Policy):
  """Keys that differ from the mean direction stay (arXiv 2504.15364).

  Paper's settings: prompts read block by block, 8,192 slots.
  """

  label: ClassVar[str] = "KeyDiff"

  def priority(
      self, slots: policy_lib.Slots, position: Int[Array, "B"]
  ) -> Num[Array, "B K C"]:
    unit, is_kept = directions.unit(slots.key), slots.pos >= 0
    return -directions.cosine_to_mean(unit, is_kept)
