"""Two policies, one after the other.

Letters: B batch, T tokens of a prompt, K key and value heads, C slots.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from joma.inference.cache import calls
from joma.inference.cache import policy as policy_lib
from joma.inference.cache import rules
from joma.inference.cost import cache_plan
from scansnap_jax.experiment import errors

# A float32 score of the first policy in each slot, read and written.
_SCORE = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Composed(policy_lib.Policy):
  """The first policy narrows a prompt, the second chooses among what is left.

  Of a prompt the `wide` C tokens of the greatest priority by the first stay at
  first, of these the C greatest by the second: kvpress's composition, but that
  the second sees what the prompt gave before anything had left. Steps go by the
  second, as the first would keep all C. What either protects stays.

  Attributes:
    first: Which narrows.
    base: Which chooses; layers' slots are its.
    wide: From 1, where the first decides alone.
    num_slots: C; set by `with_capacity`.
  """

  label: ClassVar[str] = "Two stages"
  ranks_heads_alone: ClassVar[bool] = False
  first: policy_lib.Policy
  base: policy_lib.Policy
  wide: float = 2.0
  num_slots: int = 0

  def __post_init__(self):
    super().__post_init__()
    if not self.wide >= 1:
      raise errors.UserError(f"wide={self.wide} must be at least 1.")
    parts = self.first, self.base
    if any(calls.has_own_cache(part) for part in parts):
      raise errors.UserError(
          "two_stage: a policy with a cache of its own ranks no slots; give two"
          " that do, as two_stage:snapkv+knorm."
      )
    if all(map(calls.uses_col_mass, parts)) and self.first != self.base:
      raise errors.UserError(
          "two_stage: both policies sum a prompt's attention, by weights of"
          " their own; one of them at most can."
      )

  def wrapped(self) -> tuple[policy_lib.Policy, ...]:
    """Both."""
    return self.first, self.base

  def sized(self, capacity: int) -> policy_lib.Policy:
    """Protects what either protects."""
    first, base = (
        part.with_capacity(capacity) for part in (self.first, self.base)
    )
    return dataclasses.replace(
        self,
        first=first,
        base=base,
        num_sinks=max(first.num_sinks, base.num_sinks),
        num_recent=max(first.num_recent or 0, base.num_recent or 0),
        num_slots=capacity,
    )

  def fitted(self, slots: int, named: frozenset[str]) -> policy_lib.Policy:
    """Fits both."""
    first, base = (
        calls.fitted(part, slots, named) for part in (self.first, self.base)
    )
    return dataclasses.replace(self, first=first, base=base)

  def row_weights(
      self, positions: Int[Array, "B T"], lengths: Int[Array, "B"]
  ) -> Float[Array, "B T"] | None:
    """Those of the policy that sums."""
    of = self.first if calls.uses_col_mass(self.first) else self.base
    return calls.row_weights(of, positions, lengths)

  def plan(
      self, capacities: tuple[int, ...], name: str
  ) -> cache_plan.CachePlan:
    """The second's, and the first's score."""
    base = calls.plan(self.base, capacities, name)
    return dataclasses.replace(
        base,
        slot_state=base.slot_state + _SCORE,
        slot_traffic=base.slot_traffic + 2 * _SCORE,
    )

  def init_aux(
      self, batch: int, num_kv_heads: int, capacity: int, num_groups: int
  ) -> rules.Arrays:
    shape = (batch, num_kv_heads, capacity)
    first, base = (
        calls.init_aux(part, *shape, num_groups)
        for part in (self.first, self.base)
    )
    return first, base, jnp.zeros(shape)

  def init_state(
      self, batch: int, num_kv_heads: int, head_dim: int, num_groups: int
  ) -> rules.Arrays:
    sizes = batch, num_kv_heads, head_dim, num_groups
    return tuple(
        calls.init_state(part, *sizes) for part in (self.first, self.base)
    )

  def read_prompt(self, prompt: policy_lib.Prompt) -> rules.Prompted:
    first, aux, state = calls.read_prompt(self.first, prompt)
    score, *mine = calls.read_prompt(self.base, prompt)
    return score, (aux, mine[0], first), (state, mine[1])

  def enter(
      self, token: policy_lib.Token, state: rules.Arrays
  ) -> rules.Entered:
    assert isinstance(state, tuple)  # As `init_state` makes it.
    first, aux, before = calls.enter(self.first, token, state[0])
    score, *mine = calls.enter(self.base, token, state[1])
    return score, (aux, mine[0], first), (before, mine[1])

  def observe(
      self, slots: policy_lib.Slots, step: policy_lib.Step
  ) -> rules.Observed:
    first, base = self._views(slots)
    given, aux, state = calls.observe(self.first, first, step)
    score, *mine = calls.observe(self.base, base, step)
    return score, (aux, mine[0], given), (state, mine[1])

  def priority(
      self, slots: policy_lib.Slots, position: Int[Array, "B"]
  ) -> Float[Array, "B K C"]:
    """Places in the second's order, those that the first leaves out below."""
    first, base = self._views(slots)
    narrow = self._places(calls.rank(self.first, first, position), slots.pos)
    chosen = self._places(calls.rank(self.base, base, position), slots.pos)
    size = slots.pos.shape[-1]
    num_wide = min(int(self.wide * max(self.num_slots, 1)), size)
    return jnp.where(narrow >= size - num_wide, size + chosen, narrow)

  def _places(
      self, ranks: Float[Array, "B K C"], pos: Int[Array, "B K C"]
  ) -> Float[Array, "B K C"]:
    """Each slot's place in ascending order, of equal ones the newest last."""
    order = jnp.lexsort((pos, ranks))
    return jnp.argsort(order).astype(jnp.float32)

  def _views(
      self, slots: policy_lib.Slots
  ) -> tuple[policy_lib.Slots, policy_lib.Slots]:
    """Slots as each of the two sees them."""
    assert isinstance(slots.aux, tuple)  # As `init_aux` makes it.
    state = slots.state if isinstance(slots.state, tuple) else (None, None)
    first = dataclasses.replace(
        slots, aux=slots.aux[0], score=slots.aux[2], state=state[0]
    )
    base = dataclasses.replace(slots, aux=slots.aux[1], state=state[1])
    return first, base
