"""Tokens leave when their score is low, not when others need their room.

Letters: B batch, K key and value heads, C slots.
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import ClassVar

from jaxtyping import Array, Bool, Int
import numpy as np

from joma.inference.cache import calls
from joma.inference.cache import kv_cache
from joma.inference.cache import policy as policy_lib
from joma.systems.cache_policies.wrapping import wrapper
from scansnap_jax.experiment import errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class DMS(wrapper.Bare):
  """A threshold on another policy's priority (as DMS decides, 2506.05345).

  A token whose priority is below the threshold leaves as soon as it is none of
  those that the base protects: heads and texts keep as many as they need, up to
  the capacity, above which the least leave as with the base. The paper trains a
  gate that decides when a token comes; this takes any score, as kvpress does,
  and looks again at every step. `without_unused` gives back the slots that no
  head needs.

  Paper's settings: decisions trained for some 1,000 steps, to an eighth of the
  cache.

  Attributes:
    threshold: 0 lets nothing leave that has a priority from 0 on.
  """

  label: ClassVar[str] = "DMS"
  wants_attention: ClassVar[bool] = False
  threshold: float = 0.0

  def __post_init__(self):
    super().__post_init__()
    if math.isnan(self.threshold):
      raise errors.UserError("threshold=nan must be a number.")

  def freed(
      self, slots: policy_lib.Slots, position: Int[Array, "B"]
  ) -> Bool[Array, "B K C"]:
    """What is below the threshold."""
    priority = calls.priority(self.base, self.inner(slots), position)
    return priority < self.threshold


def without_unused(
    caches: Sequence[kv_cache.SlotCache],
    position: Int[Array, "B"],
    num_free: int = 0,
) -> tuple[kv_cache.SlotCache, ...]:
  """Gives slots back that no head of a layer needs: after a prompt.

  On the host: the caches' shapes are other ones then, for which a step compiles
  anew. A layer keeps as many slots as its fullest head.

  Args:
    caches: Of this policy, one a layer.
    position: Of each sequence's next token.
    num_free: Slots that stay free for tokens to come.
  """
  found = []
  for cache in caches:
    most = int(np.asarray((cache.pos >= 0).sum(axis=-1)).max())
    policy = cache.policy
    least = policy.num_sinks + (policy.num_recent or 0) + 1
    size = max(most + num_free, least)
    if size < cache.capacity:
      cache = kv_cache.compact(cache, size, position)
    found.append(cache)
  return tuple(found)
