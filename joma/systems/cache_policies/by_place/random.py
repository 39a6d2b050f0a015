"""Any token may leave: what other policies must beat.

Letters: B batch, K key and value heads, C slots.
"""

import dataclasses
from typing import ClassVar

import jax
from jaxtyping import Array, Int, Num

from joma.inference.cache import policy as policy_lib
from joma.inference.cost import cache_plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Random(policy_lib.Policy):
  """Any unprotected token, drawn anew at each step.

  Attributes:
    seed: Of the draws, which differ by layer, head and position alone.
  """

  label: ClassVar[str] = ""
  look: ClassVar[policy_lib.Look | None] = ("#7A7A7A", "X", (0, (1, 1)))
  draws: ClassVar[bool] = True
  num_recent: int | None = 0
  seed: int = 0

  def plan(
      self, capacities: tuple[int, ...], name: str
  ) -> cache_plan.CachePlan:
    """Places decide: a step changes no score."""
    return cache_plan.window(capacities, name)

  def priority(
      self, slots: policy_lib.Slots, position: Int[Array, "B"]
  ) -> Num[Array, "B K C"]:
    num_kv_heads, capacity = slots.pos.shape[1:]
    # Slots first: more of them, or padding, leave the others' draws alone.
    draw = lambda step: jax.random.uniform(
        policy_lib.random_key(self.seed, slots.layer, step),
        (capacity, num_kv_heads),
    ).T
    return jax.vmap(draw)(position)
