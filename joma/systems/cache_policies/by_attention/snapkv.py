"""What a prompt's last queries gave: SnapKV, and PyramidKV over layers.

Letters: B batch, T tokens of a prompt, K key and value heads, G query heads of
each, C slots.
"""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from joma.inference.cache import policy as policy_lib
from joma.inference.cache import rules
from joma.inference.cost import cache_plan
from joma.systems.cache_policies import last_queries
from scansnap_jax.experiment import errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class SnapKV(last_queries.KeptWindow):
  """What a prompt's last queries gave, smoothed along the text.

  The paper (arXiv 2404.14469) stops evicting after the prompt. Here the score
  goes on as a mean with the window's length as its memory.

  Paper's settings: the last 32 to 64 queries, pooled over 5 to 7 positions.

  Attributes:
    window: The last queries of a prompt, which stay themselves.
    kernel_size: Positions that are averaged over, odd.
  """

  label: ClassVar[str] = "SnapKV"
  kernel_size: int = 5

  def __post_init__(self):
    super().__post_init__()
    if self.kernel_size < 1 or self.kernel_size % 2 == 0:
      raise errors.UserError(f"kernel_size={self.kernel_size} must be odd.")

  def kernel_options(self) -> dict[str, Any]:
    return {
        "num_sinks": self.num_sinks,
        "num_recent": self.num_recent,
        # score + (given - score) / window.
        "score": "ema",
        "decay": 1 - 1 / self.window,
        "gain": 1 / self.window,
        "reduce": "mean",
    }

  def read_prompt(self, prompt: policy_lib.Prompt) -> rules.Prompted:
    attn_weights, rows = prompt.last_weights(self.window)
    first = rows[:, :1]  # The window itself is not scored.
    is_before = (prompt.positions >= 0) & (prompt.positions < first)
    num_rows = jnp.maximum((rows >= 0).sum(-1), 1)[:, None, None]
    mean = attn_weights.sum(axis=3).mean(axis=2) / num_rows
    mean = jnp.where(is_before[:, None], mean, 0.0)
    return _moving_mean(mean, self.kernel_size), None, None

  def observe(
      self, slots: policy_lib.Slots, step: policy_lib.Step
  ) -> rules.Observed:
    return last_queries.of_step(slots, step, self.window)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
  """SnapKV with more slots in early layers (arXiv 2406.02069).

  Paper's settings: as SnapKV, and a beta of 20.

  Attributes:
    beta: The last layer has capacity / beta slots, but not fewer than it
      protects and one; the others lie on a line whose mean is the capacity.
  """

  label: ClassVar[str] = "PyramidKV"
  beta: float = 20.0

  def __post_init__(self):
    super().__post_init__()
    if self.beta < 1:
      raise errors.UserError(f"beta={self.beta} must be at least 1.")

  def capacities(self, num_layers: int, capacity: int) -> tuple[int, ...]:
    least = self.num_sinks + self.recent(capacity) + 1
    return cache_plan.pyramid(capacity, num_layers, self.beta, least)


def _moving_mean(
    score: Float[Array, "B K T"], kernel_size: int
) -> Float[Array, "B K T"]:
  """Mean of neighbours along the last axis, zeros beyond the ends."""
  around = kernel_size // 2
  padded = jnp.pad(score, ((0, 0), (0, 0), (around, around)))
  length = score.shape[-1]
  shifted = [padded[..., i : i + length] for i in range(kernel_size)]
  return sum(shifted[1:], shifted[0]) / kernel_size
