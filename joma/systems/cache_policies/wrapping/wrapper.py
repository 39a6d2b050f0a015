"""What all policies that wrap another hand on to it.

Letters: B batch, T tokens of a prompt, K key and value heads, C slots.
"""

import dataclasses
from typing import ClassVar, final

from jaxtyping import Array, Float, Int, Num

from joma.inference.cache import calls
from joma.inference.cache import policy as policy_lib
from joma.inference.cache import rules
from joma.inference.cost import cache_plan
from joma.systems.cache_policies import names
from scansnap_jax.experiment import errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wrapper(policy_lib.Policy):
  """Sizes, scores and arrays are the base's; `aux` is (the base's, its own).

  Attributes:
    base: Whose priority is changed.
    num_slots: C; set by `with_capacity`.
    wants_attention: Whether the base's priority has to be one.
  """

  base: policy_lib.Policy
  num_slots: int = 0
  ranks_heads_alone: ClassVar[bool] = False
  wants_attention: ClassVar[bool] = True

  def __post_init__(self):
    super().__post_init__()
    if self.wants_attention and not self.base.estimates_attention:
      name, base = names.name_of(self), names.name_of(self.base)
      raise errors.UserError(
          f"{name}:{base}: the priority of {base} is no attention, from 0; give"
          f" a policy whose is, as {name}:{names.COMPARED[0]}."
      )

  @final
  def wrapped(self) -> tuple[policy_lib.Policy, ...]:
    """Returns the base."""
    return (self.base,)

  @final
  def sized(self, capacity: int) -> policy_lib.Policy:
    """Protects what the base protects."""
    base = self.base.with_capacity(capacity)
    return dataclasses.replace(
        self,
        base=base,
        num_sinks=base.num_sinks,
        num_recent=base.num_recent,
        num_slots=capacity,
    )

  @final
  def fitted(self, slots: int, named: frozenset[str]) -> policy_lib.Policy:
    """Fits the base."""
    base = calls.fitted(self.base, slots, named)
    return dataclasses.replace(self, base=base)

  @final
  def row_weights(
      self, positions: Int[Array, "B T"], lengths: Int[Array, "B"]
  ) -> Float[Array, "B T"] | None:
    """Those of the base."""
    return calls.row_weights(self.base, positions, lengths)

  @final
  def init_state(
      self, batch: int, num_kv_heads: int, head_dim: int, num_groups: int
  ) -> rules.Arrays:
    """That of the base."""
    return calls.init_state(
        self.base, batch, num_kv_heads, head_dim, num_groups
    )

  @final
  def observe(
      self, slots: policy_lib.Slots, step: policy_lib.Step
  ) -> rules.Observed:
    """Lets the base see the step."""
    score, aux, state = calls.observe(self.base, self.inner(slots), step)
    return score, (aux, self.own(slots)), state

  @final
  def inner(self, slots: policy_lib.Slots) -> policy_lib.Slots:
    """Slots as the base sees them."""
    assert isinstance(slots.aux, tuple)  # As `init_aux` makes it.
    return dataclasses.replace(slots, aux=slots.aux[0])

  @final
  def own(self, slots: policy_lib.Slots) -> rules.Arrays:
    """The wrapper's own arrays of slots."""
    assert isinstance(slots.aux, tuple)
    return slots.aux[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bare(Wrapper):
  """A wrapper without arrays of its own, whose priority is the base's."""

  @final
  def init_aux(
      self, batch: int, num_kv_heads: int, capacity: int, num_groups: int
  ) -> rules.Arrays:
    """Those of the base, and none."""
    base = calls.init_aux(self.base, batch, num_kv_heads, capacity, num_groups)
    return base, None

  @final
  def plan(
      self, capacities: tuple[int, ...], name: str
  ) -> cache_plan.CachePlan:
    """The base's."""
    return calls.plan(self.base, capacities, name)

  @final
  def read_prompt(self, prompt: policy_lib.Prompt) -> rules.Prompted:
    """As the base reads it."""
    score, aux, state = calls.read_prompt(self.base, prompt)
    return score, (aux, None), state

  @final
  def enter(
      self, token: policy_lib.Token, state: rules.Arrays
  ) -> rules.Entered:
    """As the base marks it."""
    score, aux, state = calls.enter(self.base, token, state)
    return score, (aux, None), state

  @final
  def priority(
      self, slots: policy_lib.Slots, position: Int[Array, "B"]
  ) -> Num[Array, "B K C"]:
    """The base's."""
    return calls.priority(self.base, self.inner(slots), position)
