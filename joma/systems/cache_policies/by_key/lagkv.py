"""Tokens that stand out from the chunk that follows.

Letters: B batch, T tokens of a prompt, K key and value heads, G query heads of
each, C slots, H head size.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from joma.inference.cache import policy as policy_lib
from joma.inference.cache import rules
from scansnap_jax.experiment import errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class LagKV(policy_lib.Policy):
  """Tokens that stand out from the chunk that follows (arXiv 2504.04704).

  After the sinks the text is cut into chunks. When a chunk is complete, the
  tokens of the one before are scored: channels are scaled by the least and
  greatest value in the later chunk, and a token's score is its rank in its
  chunk, over the chunk's length, by the deviation over channels (softmax over
  the chunk, mean of keys and values). Tokens that are not scored yet have 1.

  Paper's settings: 4 sinks, chunks of 128.

  Attributes:
    lag_size: Tokens of a chunk, at least 2.
  """

  label: ClassVar[str] = "LagKV"
  num_sinks: int = 4
  num_recent: int | None = 0
  lag_size: int = 128

  def __post_init__(self):
    super().__post_init__()
    if self.lag_size < 2:
      raise errors.UserError(f"lag_size={self.lag_size} must be at least 2.")

  def read_prompt(self, prompt: policy_lib.Prompt) -> rules.Prompted:
    """Chunk by chunk, as the decode steps would without evictions."""
    batch, seq_len, num_kv_heads, _ = prompt.key.shape
    num_chunks = max(seq_len - self.num_sinks, 0) // self.lag_size
    pos = jnp.broadcast_to(
        prompt.positions[:, None], (batch, num_kv_heads, seq_len)
    )
    slots = policy_lib.Slots(
        prompt.key.swapaxes(1, 2),
        prompt.value.swapaxes(1, 2),
        jnp.where(pos >= 0, 1.0, 0.0),
        pos,
    )
    for chunk in range(1, num_chunks):
      last = self.num_sinks + (chunk + 1) * self.lag_size - 1
      is_complete = prompt.lengths > last
      score = self._score_chunk(slots, jnp.full(batch, last), is_complete)
      slots = dataclasses.replace(slots, score=score)
    return slots.score, None, None

  def enter(
      self, token: policy_lib.Token, state: rules.Arrays
  ) -> rules.Entered:
    return jnp.ones(token.key.shape[:2]), None, state

  def observe(
      self, slots: policy_lib.Slots, step: policy_lib.Step
  ) -> rules.Observed:
    num_after_sinks = step.position + 1 - self.num_sinks
    is_complete = (num_after_sinks % self.lag_size == 0) & (
        num_after_sinks >= 2 * self.lag_size
    )
    score = self._score_chunk(slots, step.position, is_complete)
    return score, slots.aux, slots.state

  def _score_chunk(
      self,
      slots: policy_lib.Slots,
      last: Int[Array, "B"],
      is_complete: Bool[Array, "B"],
  ) -> Float[Array, "B K C"]:
    """Scores the chunk before the one that ends at `last`, [B]."""
    age = last[:, None, None] - slots.pos
    is_later = (slots.pos >= 0) & (age >= 0) & (age < self.lag_size)
    is_scored = (age >= self.lag_size) & (age < 2 * self.lag_size)
    is_scored = is_scored & (slots.pos >= self.num_sinks)
    deviation = lambda x: jax.nn.softmax(
        jnp.where(is_scored, _lag_deviation(x, is_later), -jnp.inf)
    )
    both = (deviation(slots.key) + deviation(slots.value)) / 2
    order = jnp.argsort(jnp.where(is_scored, both, jnp.inf))
    rank = jnp.argsort(order) / self.lag_size
    chosen = is_scored & is_complete[:, None, None]
    return jnp.where(chosen, rank, slots.score)


def _lag_deviation(
    x: Float[Array, "B K C H"], is_later: Bool[Array, "B K C"]
) -> Float[Array, "B K C"]:
  """Deviation over channels, each scaled by its range among later tokens."""
  x, later = x.astype(jnp.float32), is_later[..., None]
  least = jnp.where(later, x, jnp.inf).min(axis=2, keepdims=True)
  greatest = jnp.where(later, x, -jnp.inf).max(axis=2, keepdims=True)
  extent = jnp.where(greatest > least, greatest - least, 1.0)
  least = jnp.where(jnp.isfinite(least), least, 0.0)
  return jnp.std((x - least) / extent, axis=-1, ddof=1)
