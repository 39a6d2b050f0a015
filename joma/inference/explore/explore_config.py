"""Settings of the page that shows attention and evictions; imports no jax."""

import dataclasses
from typing import Literal

from joma.systems.cache_policies import names as policy_names
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExploreConfig:
  """What is shown of a text.

  Attributes:
    policies: Names of cache policies that are shown side by side, each with
      settings of its own if need be, as h2o:score=ema:decay=0.98. Empty shows
      attention alone.
    slots: Slots of a KV head; 0 is a quarter of the tokens.
    max_new_tokens: Tokens that the model adds to the text, greedily and with
      all keys; policies read them as decode steps.
    reading: prompt reads the text at once, after which a policy evicts, and
      then the new tokens one by one; tokens reads everything one by one, so
      that policies act from the first token on.
    max_tokens: Tokens of a text that are read; what is behind them is cut.
    max_mb: Size of the page in MB, for which small attention weights are left
      out if need be.
  """

  policies: tuple[str, ...] = policy_names.SHOWN
  slots: int = 0
  max_new_tokens: int = 32
  reading: Literal["prompt", "tokens"] = "prompt"
  max_tokens: int = 2000
  max_mb: float = 18.0

  def __post_init__(self):
    require.at_least("slots", self.slots, 0)
    require.at_least("max_new_tokens", self.max_new_tokens, 0)
    require.between("max_tokens", self.max_tokens, 1, 65_000)
    require.positive("max_mb", self.max_mb)
    if len(set(self.policies)) < len(self.policies):
      raise errors.UserError(
          f"policies={','.join(self.policies)} has a name twice."
      )
    for name in self.policies:
      policy_names.check(name)
    if self.reading == "prompt" and self.policies and not self.max_new_tokens:
      raise errors.UserError(
          "reading=prompt with max_new_tokens=0 has no step at which a policy"
          " could be seen: give reading=tokens, or max_new_tokens."
      )
