"""Small random blocks on which the laws are tested."""

import jax
import jax.numpy as jnp
import numpy as np

from joma.theory import dynamics
from joma.theory import invariants

NUM_TOKENS = 8
NUM_HIDDEN = 5
ACTIVATIONS = ("identity", "relu", "gelu", "silu", "quadratic")

# One program each: operation by operation they are a hundred.
hidden = jax.jit(dynamics.hidden, static_argnums=2)
velocity = jax.jit(dynamics.velocity, static_argnums=(2, 3))
reduce = jax.jit(dynamics.reduce)
reduced_velocity = jax.jit(dynamics.reduced_velocity, static_argnums=(2, 3))
check_invariant = jax.jit(
    invariants.check_invariant, static_argnames="attention"
)


def make(num_queries, *, num_samples=16, seed=0, scale=0.3):
  """Returns a batch of several queries and initial values, in float64."""
  generator = np.random.default_rng(seed)
  width = NUM_TOKENS + num_queries + 2
  basis = np.linalg.qr(generator.normal(size=(width, width)))[0]
  batch = dynamics.Batch(
      jnp.asarray(generator.dirichlet(np.ones(NUM_TOKENS), num_samples)),
      jnp.arange(num_samples) ** 2 % num_queries,
      jnp.asarray(basis[:, :NUM_TOKENS]),
      # Orthogonal to U_C, but neither to one another nor of length 1.
      jnp.asarray(
          basis[:, NUM_TOKENS:]
          @ generator.normal(size=(num_queries + 2, num_queries))
      ),
  )
  params = dynamics.Params(
      jnp.asarray(scale * generator.normal(size=(width, NUM_HIDDEN))),
      jnp.asarray(scale * generator.normal(size=(num_queries, NUM_TOKENS))),
  )
  return batch, params


def stationary_loss(num_samples=16, seed=1):
  """Returns a loss whose gradient in h, -g, never changes."""
  shape = (num_samples, NUM_HIDDEN)
  g = jnp.asarray(3 * np.random.default_rng(seed).normal(size=shape))
  return lambda hidden, upper: -jnp.mean(jnp.sum(g * hidden, axis=1))


def upper_loss(num_samples=16, num_classes=4, seed=2):
  """Returns a cross-entropy behind upper weights, and their initial values."""
  generator = np.random.default_rng(seed)
  label = jnp.asarray(generator.integers(num_classes, size=num_samples))
  upper = jnp.asarray(generator.normal(size=(NUM_HIDDEN, num_classes)))

  def loss(hidden, upper):
    logits = 5 * hidden @ upper
    right = jnp.take_along_axis(logits, label[:, None], axis=1)[:, 0]
    return jnp.mean(jnp.log(jnp.sum(jnp.exp(logits), axis=1)) - right)

  return loss, upper
