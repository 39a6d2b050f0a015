"""The next token from logits: greedy, temperature, top-k, top-p.

Each sequence draws with a key of its own, so that what one prompt yields does
not depend on its neighbours in the batch.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

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
    seed: Of the draws.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  seed: int = 0

  def __post_init__(self):
    if self.temperature:
      require.positive("temperature", self.temperature)
    require.at_least("top_k", self.top_k, 0)
    if not 0 < self.top_p <= 1:
      raise errors.UserError(f"top_p must lie in (0, 1], got {self.top_p}.")


GREEDY = SamplingConfig()


def sample(
    logits: Float[Array, "B V"],
    config: SamplingConfig,
    step: Int[Array, ""] | int = 0,
) -> Int[Array, "B"]:
  """Draws a token a sequence.

  Args:
    logits: Not normalized.
    config: Static.
    step: Counts the draws of a continuation; each has keys of its own.
  """
  if config.temperature == 0:
    return logits.argmax(axis=-1).astype(jnp.int32)
  logits = keep_top(logits / config.temperature, config)
  prng_key = jax.random.fold_in(jax.random.key(config.seed), step)
  fold_in = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
  keys = fold_in(prng_key, jnp.arange(logits.shape[0]))
  return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def keep_top(
    logits: Float[Array, "B V"], config: SamplingConfig
) -> Float[Array, "B V"]:
  """Puts -inf where top_k or top_p leave a token out."""
  num_kept = min(config.top_k or logits.shape[-1], logits.shape[-1])
  if num_kept < logits.shape[-1]:
    least = jax.lax.top_k(logits, num_kept)[0][:, -1:]
    logits = jnp.where(logits < least, -jnp.inf, logits)
  if config.top_p < 1:
    ordered = jax.lax.top_k(logits, num_kept)[0]
    probs = jax.nn.softmax(ordered)
    # A token stays if those before it have not reached top_p yet.
    is_kept = probs.cumsum(axis=-1) - probs < config.top_p
    least = jnp.where(is_kept, ordered, jnp.inf).min(axis=-1, keepdims=True)
    logits = jnp.where(logits < least, -jnp.inf, logits)
  return logits
