"""What the model looks at when it says the text again.

Letters: B batch, T tokens of a prompt, K key and value heads, G query heads of
each, C slots, W rows at a time.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from joma.inference.cache import policy as policy_lib
from joma.inference.cache import rules

# Rows of attention that are in memory at a time.
_ROWS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVzip(policy_lib.Policy):
  """The most that a token gets from any query that repeats the text (KVzip).

  The paper (arXiv 2505.23416) has the model read a context, a request and the
  context again; a token's score is the greatest weight from queries of the
  repetition, over those and over the heads of a group. Here the repetition is
  whole, where the paper goes chunk by chunk in long texts, and each head keeps
  as many, where the paper compares heads.

  Where a text is read once the queries are its own, and the paper stops at the
  prompt: decode steps go on with the greatest weight.

  Paper's settings: 4 sinks, the text said again in chunks of 2,048 tokens,
  heads compared.

  Attributes:
    request: What is said between text and repetition.
  """

  label: ClassVar[str] = "KVzip"
  uses_queries: ClassVar[bool] = True
  estimates_attention: ClassVar[bool] = True
  num_recent: int | None = 0
  request: str = "\n\nRepeat the previous context exactly.\n\n"

  def read_prompt(self, prompt: policy_lib.Prompt) -> rules.Prompted:
    return _greatest(prompt, jnp.zeros_like(prompt.lengths)), None, None

  def read_rehearsal(
      self, prompt: policy_lib.Prompt, starts: Int[Array, "B"]
  ) -> rules.Prompted:
    """Counts the queries behind the text alone."""
    return _greatest(prompt, starts), None, None

  def observe(
      self, slots: policy_lib.Slots, step: policy_lib.Step
  ) -> rules.Observed:
    given = step.attn_weights.max(axis=2)
    return jnp.maximum(slots.score, given), slots.aux, slots.state


def _greatest(
    prompt: policy_lib.Prompt, starts: Int[Array, "B"]
) -> Float[Array, "B K T"]:
  """The greatest weight of each token from the queries at `starts` and on."""
  batch, seq_len, num_kv_heads, _ = prompt.key.shape

  def step(
      block: Int[Array, ""], so_far: Float[Array, "B K T"]
  ) -> Float[Array, "B K T"]:
    rows = block * _ROWS + jnp.arange(_ROWS)[None]
    is_counted = (rows >= starts[:, None]) & (rows < prompt.lengths[:, None])
    rows = jnp.where(is_counted, rows, -1)
    weights = prompt.weights_at(rows).max(axis=(2, 3))
    return jnp.maximum(so_far, weights)

  nothing = jnp.zeros((batch, num_kv_heads, seq_len))
  return jax.lax.fori_loop(0, -(-seq_len // _ROWS), step, nothing)
