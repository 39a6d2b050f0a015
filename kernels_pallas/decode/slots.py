"""The cache of a decode step: C slots for each sequence and key head.

Letters: B batch, N query heads, K key and value heads, C slots, H size of a
key's head, J of a value's.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8

from kernels_pallas import array_types

# At `pos`: nobody's slot, and one that no token may take. Heads with budgets of
# their own close what is left of their last page.
EMPTY, CLOSED = -1, -2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
  """Keys and values in no order, and what is known of each.

  Attributes:
    key: [B, K, C, H], of a float type or int8. Finite also where a slot is
      empty.
    value: As key, of J numbers.
    score: float32 [B, K, C], the attention that a slot has received.
    pos: int32 [B, K, C], where its token stands; -1 marks an empty slot, -2 a
      closed one, which stays empty.
    key_scale: float32 [B, K, C] with int8, else None: a key is its numbers
      times this.
    value_scale: As key_scale.
    votes: int32 [B, K, C] of a rule with votes, the last in the lowest bit.
  """

  key: array_types.Leaf
  value: array_types.Leaf
  score: array_types.Leaf
  pos: array_types.Leaf
  key_scale: array_types.Leaf = None
  value_scale: array_types.Leaf = None
  votes: array_types.Leaf = None

  @property
  def capacity(self) -> int:
    """C."""
    return self.pos.shape[-1]

  @property
  def is_quantized(self) -> bool:
    """Whether keys and values are int8."""
    return self.key_scale is not None

  @property
  def small(self) -> dict[str, Array]:
    """What is a number a slot, by name."""
    names = ("score", "pos", "key_scale", "value_scale", "votes")
    return {
        name: getattr(self, name)
        for name in names
        if getattr(self, name) is not None
    }


class Token(NamedTuple):
  """What a step brings: a new token of each sequence.

  Attributes:
    query: Any float type.
    key: K divides N.
    value: As key.
    positions: Where the tokens stand; -1 marks an inactive sequence.
  """

  query: Float[Array, "B N H"]
  key: Float[Array, "B K H"]
  value: Float[Array, "B K J"]
  positions: Int[Array, "B"]


# Out, the cache after the step, and the slot that each new token took.
Stepped = tuple[Float[Array, "B N J"], Slots, Int[Array, "B K"]]


def empty(
    batch_size: int,
    num_kv_heads: int,
    capacity: int,
    head_dim: int,
    dtype: jax.typing.DTypeLike = jnp.float32,
    has_votes: bool = False,
    value_dim: int | None = None,
) -> Slots:
  """Returns a cache that holds nothing yet.

  Args:
    batch_size: B.
    num_kv_heads: K.
    capacity: C.
    head_dim: H.
    dtype: Of keys and values; int8 stores them with a scale a slot.
    has_votes: Whether a rule with votes will use it.
    value_dim: J; None is H.
  """
  lead = (batch_size, num_kv_heads, capacity)
  # Buffers of their own: each is donated.
  rows = lambda size: jnp.zeros((*lead, size), dtype)
  scales = lambda: (
      jnp.zeros(lead, jnp.float32) if jnp.dtype(dtype) == jnp.int8 else None
  )
  return Slots(
      key=rows(head_dim),
      value=rows(head_dim if value_dim is None else value_dim),
      score=jnp.zeros(lead, jnp.float32),
      pos=jnp.full(lead, EMPTY, jnp.int32),
      key_scale=scales(),
      value_scale=scales(),
      votes=jnp.zeros(lead, jnp.int32) if has_votes else None,
  )


def quantize(
    x: Float[Array, "*rows H"],
) -> tuple[Int8[Array, "*rows H"], Float[Array, "*rows"]]:
  """Rounds each row to 127 steps on either side of 0; also their size.

  A row of zeros has size 0. Off by half a step: max |x| / 254 at most.
  """
  x = x.astype(jnp.float32)
  # A product, not a quotient, so that all implementations round alike.
  scale = jnp.abs(x).max(axis=-1) * (1 / 127)
  # The inner select keeps 1 / 0 out of the branch that is not taken.
  inverse = jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1), 0)
  steps = jnp.clip(jnp.round(x * inverse[..., None]), -127, 127)
  return steps.astype(jnp.int8), scale
