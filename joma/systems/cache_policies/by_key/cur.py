"""Long keys with long values stay, as measured among their neighbours.

Letters: B batch, T tokens of a prompt, K key and value heads, C slots, H head
size.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from joma.inference.cache import policy as policy_lib
from joma.inference.cache import rules
from joma.systems.cache_policies import chunks
from scansnap_jax.experiment import errors

# Below any square of a length that counts.
_LEAST = 1e-30


@dataclasses.dataclass(frozen=True, kw_only=True)
class CUR(policy_lib.Policy):
  """Approximate leverage scores of keys and values (CurDKV, 2509.15038).

  Rows of a CUR decomposition are chosen by their leverage, for which squared
  lengths stand here:

    |key|^2 / sum |key|^2  x  |value|^2 / sum |value|^2

  where the sums are over the kept tokens of the same chunk of the text. The
  paper stops at the prompt; here chunks go on, so that a token whose neighbours
  have left is worth more. Random projections of the paper are left out.

  Paper's settings: 4 sinks, scores averaged over 16 tokens, keys times values.

  Attributes:
    chunk_size: Tokens of a chunk.
  """

  label: ClassVar[str] = "CurDKV"
  num_sinks: int = 4
  num_recent: int | None = 0
  chunk_size: int = 16

  def __post_init__(self):
    super().__post_init__()
    if self.chunk_size < 1:
      raise errors.UserError(
          f"chunk_size={self.chunk_size} must be at least 1."
      )

  def init_aux(
      self, batch: int, num_kv_heads: int, capacity: int, num_groups: int
  ) -> rules.Arrays:
    squares = lambda: jnp.zeros((batch, num_kv_heads, capacity))
    return squares(), squares()

  def read_prompt(self, prompt: policy_lib.Prompt) -> rules.Prompted:
    squares = _squares(prompt.raw_key, prompt.value)
    key, value = (x.swapaxes(1, 2) for x in squares)
    return jnp.zeros_like(key), (key, value), None

  def enter(
      self, token: policy_lib.Token, state: rules.Arrays
  ) -> rules.Entered:
    squares = _squares(token.raw_key, token.value)
    return jnp.zeros_like(squares[0]), squares, state

  def priority(
      self, slots: policy_lib.Slots, position: Int[Array, "B"]
  ) -> Num[Array, "B K C"]:
    del position
    assert isinstance(slots.aux, tuple)  # As `init_aux` makes it.
    key, value = (self._share(x, slots.pos) for x in slots.aux)
    return key * value

  def _share(
      self, squares: Float[Array, "B K C"], pos: Int[Array, "B K C"]
  ) -> Float[Array, "B K C"]:
    total = chunks.sums(squares, pos, self.chunk_size)
    return squares / jnp.maximum(total, _LEAST)


def _squares(
    key: Float[Array, "*b H"], value: Float[Array, "*b H"]
) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
  """Squared lengths; a rotation would round those of keys."""
  square = lambda x: jnp.square(x.astype(jnp.float32)).sum(axis=-1)
  return square(key), square(value)
