"""Heavy hitters: what attention has given a token so far.

Letters: B batch, T tokens of a prompt, K key and value heads, G query heads of
each, C slots.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from joma.inference.cache import policy as policy_lib
from joma.inference.cache import rules
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class H2O(policy_lib.Policy):
  """Heavy hitters: what attention has given a token so far (arXiv 2306.14048).

  Causal and per key head: a prompt's queries count in full, later ones over
  what is kept. `score="ema"` is A2SF (arXiv 2407.20485).

  Paper's settings: half of the slots for heavy hitters, half for the newest
  tokens; 20 % of the text.

  Attributes:
    score: "sum" of weights, "mean" over the queries since the token, or "ema",
      the sum with a factor `decay` a step.
    decay: In (0, 1]; of "ema" alone.
    reduce: How query heads that share a key head vote. "max" of a prompt is of
      the heads' sums.
  """

  label: ClassVar[str] = "H2O"
  look: ClassVar[policy_lib.Look | None] = ("#D55E00", "o", "-")
  uses_col_mass: ClassVar[bool] = True
  estimates_attention: ClassVar[bool] = True
  score: Literal["sum", "mean", "ema"] = "sum"
  decay: float = 0.98
  reduce: policy_lib.Reduce = "sum"

  def __post_init__(self):
    super().__post_init__()
    require.one_of("score", self.score, ("sum", "mean", "ema"))
    require.one_of("reduce", self.reduce, ("sum", "max"))
    if not 0 < self.decay <= 1:
      raise errors.UserError(f"decay={self.decay} must be in (0, 1].")

  def kernel_options(self) -> dict[str, Any]:
    return {
        "num_sinks": self.num_sinks,
        "num_recent": self.num_recent,
        "score": self.score,
        "decay": self.decay if self.score == "ema" else 1.0,
        "reduce": self.reduce,
    }

  def row_weights(
      self, positions: Int[Array, "B T"], lengths: Int[Array, "B"]
  ) -> Float[Array, "B T"] | None:
    if self.score != "ema":
      return None
    age = (lengths[:, None] - 1 - positions).astype(jnp.float32)
    return jnp.where(positions >= 0, jnp.float32(self.decay) ** age, 0.0)

  def read_prompt(self, prompt: policy_lib.Prompt) -> rules.Prompted:
    assert prompt.col_mass is not None  # It was asked for.
    return policy_lib.group_sum(prompt.col_mass, self.reduce), None, None

  def priority(
      self, slots: policy_lib.Slots, position: Int[Array, "B"]
  ) -> Num[Array, "B K C"]:
    if self.score != "mean":
      return slots.score
    num_queries = jnp.maximum(position[:, None, None] - slots.pos, 1)
    return slots.score / num_queries

  def observe(
      self, slots: policy_lib.Slots, step: policy_lib.Step
  ) -> rules.Observed:
    given = policy_lib.group_sum(step.attn_weights, self.reduce)
    decay = self.decay if self.score == "ema" else 1.0
    return decay * slots.score + given, slots.aux, slots.state

  def kept_mass(
      self, slots: policy_lib.Slots, position: Int[Array, "B"]
  ) -> Float[Array, "B K"] | None:
    if self.score == "ema" or self.reduce == "max":
      # Neither is a sum of what was given: no share follows from it.
      return None
    kept = jnp.where(slots.pos >= 0, slots.score, 0.0).sum(axis=-1)
    return kept / jnp.maximum(position * slots.num_groups, 1)[:, None]
