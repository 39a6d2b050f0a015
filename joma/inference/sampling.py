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
  return draw(logits, config, jax.random.key(config.seed), step)


def is_greedy(config: sampling_config.SamplingConfig) -> bool:
  """Whether the largest logit is taken, and nothing drawn."""
  return config.temperature < _GREEDY_BELOW


def draw(
    logits: Float[Array, "B V"],
    config: sampling_config.SamplingConfig,
    key: Array,
    step: Int[Array, ""] | int,
) -> Int[Array, "B"]:
  """As `sample`, with the keys of a stream of one's own.

  Args:
    logits: Not normalized.
    config: Static.
    key: Of the stream.
    step: Counts the draws of it.
  """
  keys = row_keys(jax.random.fold_in(key, step), logits.shape[0])
  return draw_by(logits, config, keys)


def draw_by(
    logits: Float[Array, "B V"],
    config: sampling_config.SamplingConfig,
    keys: Array,
) -> Int[Array, "B"]:
  """As `sample`, each sequence by a key of its own, [B]."""
  if is_greedy(config):
    return logits.argmax(axis=-1).astype(jnp.int32)
  logits = keep_top(logits / config.temperature, config)
  return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def row_keys(key: Array, num_rows: int) -> Array:
  """A key a sequence."""
  fold_in = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
  return fold_in(key, jnp.arange(num_rows))


def probs(
    logits: Float[Array, "*B V"], config: sampling_config.SamplingConfig
) -> Float[Array, "*B V"]:
  """Returns the probabilities by which `sample` draws, above temperature 0."""
  flat = logits.reshape(-1, logits.shape[-1]) / config.temperature
  return jax.nn.softmax(keep_top(flat, config)).reshape(logits.shape)


def keep_top(
    logits: Float[Array, "B V"], config: sampling_config.SamplingConfig
) -> Float[Array, "B V"]:
  """Puts -inf where top_k or top_p leave a token out."""
  if 0 < config.top_k < logits.shape[-1]:
    logits = _of_greatest(logits, jnp.ones_like(logits), config.top_k)
  if config.top_p < 1:
    # A token stays if those before it have not reached top_p yet.
    logits = _of_greatest(logits, jax.nn.softmax(logits), config.top_p)
  return logits


def _of_greatest(
    logits: Float[Array, "B V"], weights: Float[Array, "B V"], goal: float | int
) -> Float[Array, "B V"]:
  """Keeps the fewest greatest logits whose weights sum to the goal.

  Equal logits stay together. Instead of a sort, bit by bit, the greatest number
  is found that leaves enough weight at and above it: 32 sums.
  """
  # Unsigned integers in the order of floats; -0 is 0.
  bits = jax.lax.bitcast_convert_type(
      logits.astype(jnp.float32) + 0.0, jnp.uint32
  )
  order = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))

  def set_bit(i: Int[Array, ""] | int, least: Array) -> Array:
    higher = least | (jnp.uint32(1 << 31) >> jnp.asarray(i, jnp.uint32))
    weight = jnp.where(order >= higher, weights, 0).sum(axis=-1, keepdims=True)
    return jnp.where(weight >= goal, higher, least)

  start = jnp.zeros((logits.shape[0], 1), jnp.uint32)
  least = jax.lax.fori_loop(0, 32, set_bit, start)
  return jnp.where(order < least, -jnp.inf, logits)
