"""What a question at the end of a prompt gave, each query's share made equal.

Letters: B batch, K key and value heads, C slots.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from joma.inference.cache import policy as policy_lib
from joma.inference.cache import rules
from joma.systems.cache_policies import last_queries


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finch(last_queries.KeptWindow):
  """A prompt's last queries, times how many tokens each could see (FINCH).

  A query that sees n tokens gives each 1 / n in the mean: times n, all queries
  count alike, wherever they stand (TACL 2024, 10.1162/tacl_a_00716). As with
  SnapKV the queries are those of the question, which stay themselves; nothing
  is smoothed along the text.

  The paper reads a long context chunk by chunk, what was kept of earlier chunks
  before each: that is a prompt in pieces, each with its question. It numbers
  kept tokens anew, as `positions="rolled"` does here, and stops after the
  prompt; here the score goes on as a mean with the window's length as its
  memory.

  Paper's settings: the question's own tokens as the window.

  Attributes:
    window: Tokens of the question, the last of the prompt.
  """

  label: ClassVar[str] = "FINCH"

  def read_prompt(self, prompt: policy_lib.Prompt) -> rules.Prompted:
    attn_weights, rows = prompt.last_weights(self.window)
    num_rows = jnp.maximum((rows >= 0).sum(-1), 1)[:, None, None]
    num_seen = jnp.maximum(rows + 1, 0)[:, None, None, :, None]
    given = (attn_weights * num_seen).sum(axis=3).mean(axis=2)
    return given / num_rows, None, None

  def observe(
      self, slots: policy_lib.Slots, step: policy_lib.Step
  ) -> rules.Observed:
    num_seen = (slots.pos >= 0).sum(axis=-1, keepdims=True)
    given = step.attn_weights.mean(axis=2) * num_seen
    score = slots.score + (given - slots.score) / self.window
    return score, slots.aux, slots.state
