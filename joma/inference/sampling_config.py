"""How the next token is chosen; imports no jax."""

import dataclasses

from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
  """How a token is chosen.

  Attributes:
    temperature: Divides the logits; 0 takes the largest logit (greedy).
    top_k: Tokens among which to draw, the most probable ones; 0 is all.
    top_p: Draws among the fewest tokens whose probabilities sum to at least
      this much (https://arxiv.org/abs/1904.09751); 1 is all. Comes after top_k.
    seed: Random seed for sampling.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  seed: int = 0

  def __post_init__(self):
    if self.temperature:
      require.positive("temperature", self.temperature)
    require.seeds("seed", self.seed)
    require.at_least("top_k", self.top_k, 0)
    if not 0 < self.top_p <= 1:
      raise errors.UserError(f"top_p must lie in (0, 1], got {self.top_p}.")


GREEDY = SamplingConfig()
