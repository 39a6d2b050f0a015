"""Values of tokens that leave go to those that stay behind them.

Letters: B batch, K key and value heads, C slots, L tokens that may leave, H
head size.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from joma.inference.cache import calls
from joma.inference.cache import policy as policy_lib
from joma.systems.cache_policies.wrapping import wrapper
from scansnap_jax.experiment import errors

# Tokens that hand their values on at a time.
_AT_ONCE = 256
# Below any attention that counts, above 0.
_LEAST = 1e-30


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaM(wrapper.Bare):
  """Cache merging over another policy's priority A (CaM, ICML 2024).

  A token i that leaves hands its value to the M that stay and follow it in the
  text, fewer at the end of what is kept:

    value_j += b value_i / M,    b = 1 with chance min(1, A_i / mean_j A_j)

  so that, in the mean, attention that went to i goes to its value still. Keys
  stay as they are. Heads choose and draw for themselves. The paper merges at
  decode steps, one token each; here tokens that do not stay after a prompt do
  the same, all at once, with the values as the prompt had them. Costs leave
  out the M values that a step changes.

  Attributes:
    num_merged: M.
    seed: Of the draws, which differ by layer, head and position alone.
  """

  label: ClassVar[str] = "CaM"
  draws: ClassVar[bool] = True
  num_merged: int = 32
  seed: int = 0

  def __post_init__(self):
    super().__post_init__()
    if self.num_merged < 1:
      raise errors.UserError(
          f"num_merged={self.num_merged} must be at least 1."
      )

  def merged(
      self,
      slots: policy_lib.Slots,
      leaving: Int[Array, "B K L"],
      stays: Bool[Array, "B K C"],
      position: Int[Array, "B"],
  ) -> Float[Array, "B K C H"]:
    attention = calls.priority(self.base, self.inner(slots), position)
    pos = jnp.take_along_axis(slots.pos, leaving, axis=-1)
    value = slots.value.astype(jnp.float32)
    added = jax.vmap(jax.vmap(self._of_head))(
        value,
        attention.astype(jnp.float32),
        slots.pos,
        stays,
        leaving,
        self._draws(pos, slots.layer),
    )
    return value + added

  def _draws(
      self, pos: Int[Array, "B K L"], layer: int
  ) -> Float[Array, "B K L"]:
    """Uniform numbers, the same for a token whoever leaves beside it."""

    def draw(head: Int[Array, ""], pos: Int[Array, ""]) -> Float[Array, ""]:
      key = policy_lib.random_key(self.seed, layer, jnp.maximum(pos, 0))
      return jax.random.uniform(jax.random.fold_in(key, head))

    of_heads = jax.vmap(jax.vmap(draw, (None, 0)), (0, 0))
    return jax.vmap(of_heads, (None, 0))(jnp.arange(pos.shape[1]), pos)

  def _of_head(
      self,
      value: Float[Array, "C H"],
      attention: Float[Array, "C"],
      pos: Int[Array, "C"],
      stays: Bool[Array, "C"],
      leaving: Int[Array, "L"],
      drawn: Float[Array, "L"],
  ) -> Float[Array, "C H"]:
    """What is added to the values of a head."""
    last = jnp.iinfo(jnp.int32).max
    staying = jnp.sort(jnp.where(stays, pos, last))
    place = jnp.searchsorted(staying, pos)

    def hand_on(
        added: Float[Array, "C H"], some: tuple[Array, Array]
    ) -> tuple[Float[Array, "C H"], None]:
      index, drawn = some
      first = place[index][:, None]
      is_near = (place[None] >= first) & (place[None] < first + self.num_merged)
      follows = stays[None] & is_near
      count = jnp.maximum(follows.sum(axis=-1), 1)
      mean = jnp.where(follows, attention[None], 0.0).sum(axis=-1) / count
      # A token that has got something merges where its followers got nothing.
      chance = attention[index] / jnp.maximum(mean, _LEAST)
      merges = ~stays[index] & (pos[index] >= 0) & (drawn < chance)
      share = jnp.where(follows & merges[:, None], 1 / count[:, None], 0.0)
      given = jnp.einsum(
          "LC,LH->CH", share, value[index], precision=jax.lax.Precision.HIGHEST
      )
      return added + given, None

    size = min(_AT_ONCE, len(leaving))
    more = -len(leaving) % size
    # Nobody merges by a draw above 1.
    some = jnp.pad(leaving, (0, more)), jnp.pad(
        drawn, (0, more), constant_values=jnp.inf
    )
    some = jax.tree.map(lambda x: x.reshape(-1, size), some)
    return jax.lax.scan(hand_on, jnp.zeros_like(value), some)[0]
