"""Attention, and how much a token's value adds to the residual stream.

Letters: B batch, T tokens, N query heads, K key and value heads, G = N / K, C
slots, H head size, D width.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from joma.inference.cache import calls
from joma.inference.cache import policy as policy_lib
from joma.inference.cache import rules
from joma.inference.cost import cache_plan
from joma.systems.cache_policies.wrapping import wrapper
from scansnap_jax.experiment import errors

# Above every product of attention and a norm; sums of a page stay finite.
_FIRST = 1e30
# A float32 norm of each slot, which a step reads.
_NORM = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class CriticalKV(wrapper.Wrapper):
  """Two stages over another policy's priority A (CriticalKV, 2502.03805).

  The first share of the slots, those that are protected aside, goes to the
  greatest A. The others go to the greatest

    (A + epsilon) mean over the group's heads n of |W_out[n]^T value|_1

  which bounds how far the layer's output moves if the token leaves. Of equal A
  the newest comes first. A cache that nobody tells W_out, as where no model
  calls it, takes |value|_1 in its place.

  The paper stops at the prompt; here each decode step chooses in the same way.

  Paper's settings: half of the slots by the first stage, epsilon 1e-4.

  Attributes:
    first_share: Of the slots that go by A alone, in [0, 1).
    epsilon: Added to A, so that values count where attention is 0.
  """

  label: ClassVar[str] = "CriticalKV"
  first_share: float = 0.5
  epsilon: float = 1e-4

  def __post_init__(self):
    super().__post_init__()
    if not 0 <= self.first_share < 1:
      raise errors.UserError(
          f"first_share={self.first_share} must be in [0, 1)."
      )
    if not self.epsilon >= 0:
      raise errors.UserError(f"epsilon={self.epsilon} must be at least 0.")

  def init_aux(
      self, batch: int, num_kv_heads: int, capacity: int, num_groups: int
  ) -> rules.Arrays:
    shape = (batch, num_kv_heads, capacity)
    return calls.init_aux(self.base, *shape, num_groups), jnp.zeros(shape)

  def plan(
      self, capacities: tuple[int, ...], name: str
  ) -> cache_plan.CachePlan:
    """The base's, and a norm a slot."""
    base = calls.plan(self.base, capacities, name)
    return dataclasses.replace(
        base,
        slot_state=base.slot_state + _NORM,
        slot_traffic=base.slot_traffic + _NORM,
    )

  def read_prompt(self, prompt: policy_lib.Prompt) -> rules.Prompted:
    score, aux, state = calls.read_prompt(self.base, prompt)
    kernel = prompt.options.out_kernel
    # Head by head: of all together what is made is N times as long.
    one_head = lambda head: _added(head[0][:, :, None], head[1])[:, :, 0]
    value = jnp.moveaxis(prompt.value, 2, 0)
    if kernel is not None:
      kernel = kernel.reshape(len(value), 1, -1, *kernel.shape[1:])
    norm = jax.lax.map(one_head, (value, kernel))
    return score, (aux, jnp.moveaxis(norm, 0, 1)), state

  def enter(
      self, token: policy_lib.Token, state: rules.Arrays
  ) -> rules.Entered:
    score, aux, state = calls.enter(self.base, token, state)
    kernel = token.out_kernel
    if kernel is not None:
      heads = token.value.shape[1]
      kernel = kernel.reshape(heads, -1, *kernel.shape[1:])
    norm = _added(token.value[:, None], kernel)[:, 0]
    return score, (aux, norm), state

  def priority(
      self, slots: policy_lib.Slots, position: Int[Array, "B"]
  ) -> Num[Array, "B K C"]:
    attention = calls.priority(self.base, self.inner(slots), position)
    second = (attention + self.epsilon) * self.own(slots)
    return jnp.where(self._is_first(slots, attention, position), _FIRST, second)

  def _is_first(
      self,
      slots: policy_lib.Slots,
      attention: Float[Array, "B K C"],
      position: Int[Array, "B"],
  ) -> Array:
    """Whether a slot is kept for its attention alone."""
    protected = self.num_sinks + (self.num_recent or 0)
    count = int(self.first_share * (self.num_slots - protected))
    stays = self.is_protected(slots.pos, position) | (slots.pos < 0)
    attention = jnp.where(stays, -jnp.inf, attention)
    order = jnp.lexsort((slots.pos, attention))
    return jnp.argsort(order) >= order.shape[-1] - count


def _added(
    value: Float[Array, "B T K H"], kernel: Float[Array, "K G H D"] | None
) -> Float[Array, "B T K"]:
  """1-norm of what a value adds to the residual stream, mean over G."""
  value = value.astype(jnp.float32)
  if kernel is None:
    return jnp.abs(value).sum(axis=-1)
  added = jnp.einsum("BTKH,KGHD->BTKGD", value, kernel.astype(jnp.float32))
  return jnp.abs(added).sum(axis=-1).mean(axis=-1)
