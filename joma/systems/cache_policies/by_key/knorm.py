"""Short keys stay.

Letters: B batch, T tokens of a prompt, K key and value heads, G query heads of
each, C slots, H head size.
"""

import dataclasses
from typing import ClassVar

from joma.inference.cache import policy as policy_lib
from joma.systems.cache_policies.by_key import directions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knorm(policy_lib.Policy):
  """Short keys stay: they get more attention (arXiv 2406.11430)."""

  label: ClassVar[str] = "Knorm"

  def kernel_options(self):
    return {
        "num_sinks": self.num_sinks,
        "num_recent": self.num_recent,
        "score": "key_norm",
    }

  def read_prompt(self, prompt):
    return -directions.norm(prompt.key).swapaxes(1, 2), None, None

  def enter(self, token, state):
    return -directions.norm(token.key), None, state
