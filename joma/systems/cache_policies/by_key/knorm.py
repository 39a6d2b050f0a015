"""Short keys stay.

Letters: B batch, T tokens of a prompt, K key and value heads, G query heads of
each, C slots, H head size.
"""

import dataclasses
from typing import Any, ClassVar

from joma.inference.cache import policy as policy_lib
from joma.inference.cache import rules
from joma.systems.cache_policies.by_key import directions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knorm(policy_lib.Policy):
  """Short keys stay: they get more attention (arXiv 2406.11430).

  A rotation leaves a key's length as it is but for rounding, so that the length
  is taken before: equal keys are equal wherever they stand.

  Paper's settings: none beside the number of slots.
  """

  label: ClassVar[str] = "Knorm"

  def kernel_options(self) -> dict[str, Any]:
    return {
        "num_sinks": self.num_sinks,
        "num_recent": self.num_recent,
        "score": "key_norm",
    }

  def read_prompt(self, prompt: policy_lib.Prompt) -> rules.Prompted:
    return -directions.norm(prompt.raw_key).swapaxes(1, 2), None, None

  def enter(
      self, token: policy_lib.Token, state: rules.Arrays
  ) -> rules.Entered:
    return -directions.norm(token.raw_key), None, state
