"""Tokens that are attended to and not redundant.

Letters: B batch, T tokens of a prompt, K key and value heads, G query heads of
each, C slots, H head size.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Num

from joma.inference.cache import policy as policy_lib
from joma.inference.cache import rules
from joma.systems.cache_policies import last_queries
from joma.systems.cache_policies.by_key import directions
from scansnap_jax.experiment import errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class RKV(last_queries.LastQueries):
  """Attended to and not redundant (after arXiv 2505.24133).

    priority = mix attention / sum(attention) - (1 - mix) softmax(cosine)

  attention is a mean over the last queries, cosine that of a key with the mean
  direction of the kept keys: the paper's mean of pairwise cosines up to a
  factor, at linear cost and at every step.

  Paper's settings: the last 8 queries, 10 to 16 % of the cache of distilled R1
  models.

  Attributes:
    mix: Of attention, in [0, 1].
    window: Queries that the mean remembers.
  """

  label: ClassVar[str] = "R-KV"
  mix: float = 0.1

  def __post_init__(self):
    super().__post_init__()
    if not 0 <= self.mix <= 1:
      raise errors.UserError(f"mix={self.mix} must be in [0, 1].")

  def read_prompt(self, prompt: policy_lib.Prompt) -> rules.Prompted:
    return last_queries.of_prompt(prompt, self.window)

  def observe(
      self, slots: policy_lib.Slots, step: policy_lib.Step
  ) -> rules.Observed:
    return last_queries.of_step(slots, step, self.window)

  def priority(
      self, slots: policy_lib.Slots, position: Int[Array, "B"]
  ) -> Num[Array, "B K C"]:
    is_kept = slots.pos >= 0
    attention = jnp.where(is_kept, slots.score, 0.0)
    total = attention.sum(axis=-1, keepdims=True)
    cosine = directions.cosine_to_mean(directions.unit(slots.key), is_kept)
    redundancy = jax.nn.softmax(jnp.where(is_kept, cosine, -jnp.inf))
    wanted = attention / jnp.maximum(total, 1e-30)
    return self.mix * wanted - (1 - self.mix) * redundancy
