"""What the last query alone gave.

Letters: B batch, T tokens of a prompt, K key and value heads, G query heads of
each, C slots.
"""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from joma.inference.cache import policy as policy_lib
from joma.inference.cache import rules


@dataclasses.dataclass(frozen=True, kw_only=True)
class TOVA(policy_lib.Policy):
  """What the last query alone gave, averaged over heads (arXiv 2401.06104).

  All heads of a layer keep the same tokens.

  Paper's settings: no sinks and no window set apart, one choice for all heads
  of a layer.
  """

  label: ClassVar[str] = "TOVA"
  uses_queries: ClassVar[bool] = True
  num_recent: int | None = 0
  ranks_heads_alone: ClassVar[bool] = False
  estimates_attention: ClassVar[bool] = True

  def kernel_options(self) -> dict[str, Any]:
    return {
        "num_sinks": self.num_sinks,
        "num_recent": self.num_recent,
        # Nothing is left of what earlier queries gave.
        "score": "ema",
        "decay": 0.0,
        "reduce": "layer",
    }

  def read_prompt(self, prompt: policy_lib.Prompt) -> rules.Prompted:
    attn_weights, _ = prompt.last_weights(1)
    return self._of_layer(attn_weights[:, :, :, 0]), None, None

  def observe(
      self, slots: policy_lib.Slots, step: policy_lib.Step
  ) -> rules.Observed:
    return self._of_layer(step.attn_weights), slots.aux, slots.state

  def _of_layer(
      self, attn_weights: Float[Array, "B K G C"]
  ) -> Float[Array, "B K C"]:
    mean = attn_weights.mean(axis=(1, 2))[:, None]
    num_kv_heads = attn_weights.shape[1]
    return jnp.broadcast_to(mean, (len(mean), num_kv_heads, mean.shape[-1]))
