"""The next token from logits: greedy, temperature, top-k, top-p.

Each sequence draws with a key of its own, so that what one prompt yields does
not depend on its neighbours in the batch.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from joma.inference import sampling_config

# Divided by less, float32 logits of usual size overflow.
_GREEDY_BELOW = 1e-6


def sample(
    logits: Float[Array, "B V"],
    config: sampling_config.SamplingConfig,
    step: Int[Array, ""] | int = 0,
) -> Int[Array, "B"]:
  """Draws a token a sequence.

  Args:
    logits: Not normalized.
    config: Static.
    step: Counts the draws of a continuation; each has keys of its own.
  """
  if config.temperature < _GREEDY_BELOW:
    return logits.argmax(axis=-1).astype(jnp.int32)
  logits = keep_top(logits / config.temperature, config)
  prng_key = jax.random.fold_in(jax.random.key(config.seed), step)
  fold_in = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
  keys = fold_in(prng_key, jnp.arange(logits.shape[0]))
  return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def keep_top(
    logits: Float[Array, "B V"], config: sampling_config.SamplingConfig
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
