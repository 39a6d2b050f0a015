"""Tokens that were often above average lately.

Letters: B batch, T tokens of a prompt, K key and value heads, G query heads of
each, C slots.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from joma.inference.cache import policy as policy_lib
from joma.inference.cache import rules
from scansnap_jax.experiment import errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scissorhands(policy_lib.Policy):
  """Tokens that were often above average lately (arXiv 2305.17118).

  The score counts, among the last queries, those that gave the token more than
  1 / n, of n tokens seen; heads that share a key head are averaged.

  Attributes:
    history: Queries that are remembered, 1 to 32: a bit each.
  """

  label: ClassVar[str] = "Scissorhands"
  uses_queries: ClassVar[bool] = True
  history: int = 32

  def __post_init__(self):
    super().__post_init__()
    if not 1 <= self.history <= 32:
      raise errors.UserError(f"history={self.history} must be from 1 to 32.")

  def kernel_options(self) -> dict[str, Any]:
    return {
        "num_sinks": self.num_sinks,
        "num_recent": self.num_recent,
        "score": "votes",
        "history": self.history,
        "reduce": "mean",
    }

  def init_aux(
      self, batch: int, num_kv_heads: int, capacity: int, num_groups: int
  ) -> rules.Arrays:
    return jnp.zeros((batch, num_kv_heads, capacity), jnp.uint32)

  def read_prompt(self, prompt: policy_lib.Prompt) -> rules.Prompted:
    attn_weights, rows = prompt.last_weights(self.history)
    num_seen = jnp.maximum(rows + 1, 1)[:, None, :, None]
    is_above = attn_weights.mean(axis=2) * num_seen > 1
    ages = jnp.arange(self.history - 1, -1, -1, dtype=jnp.uint32)
    bits = is_above.astype(jnp.uint32) << ages[None, None, :, None]
    bits = bits.sum(axis=2, dtype=jnp.uint32)
    return self._count(bits), bits, None

  def enter(
      self, token: policy_lib.Token, state: rules.Arrays
  ) -> rules.Entered:
    zeros = jnp.zeros(token.key.shape[:2])
    return zeros, zeros.astype(jnp.uint32), state

  def observe(
      self, slots: policy_lib.Slots, step: policy_lib.Step
  ) -> rules.Observed:
    num_seen = jnp.isfinite(step.attn_logits[:, :, :1]).sum(-1)
    is_above = step.attn_weights.mean(axis=2) * num_seen > 1
    bits = (slots.aux << 1) | is_above.astype(jnp.uint32)
    bits = bits & jnp.uint32(2**self.history - 1)
    return self._count(bits), bits, slots.state

  def _count(self, bits: UInt32[Array, "B K C"]) -> Float[Array, "B K C"]:
    return jax.lax.population_count(bits).astype(jnp.float32)
