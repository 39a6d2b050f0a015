"""The router of Flux: what it reads of a prompt, what it says, what it costs.

Letters: B batch, T tokens, N query heads, H head size, R hidden units.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from joma.transformer import hooks

_START = 4.5  # Of the bias for full; the other begins at 0.


def draw(key: Array, size: int, hidden: int, start: float) -> dict[str, Array]:
  """Draws the router's weights.

  Args:
    key: Random key.
    size: H.
    hidden: R.
    start: Standard deviation of the last weights.
  """
  one, two, three = jax.random.split(key, 3)
  normal = lambda key, *shape: (
      (2 / shape[0]) ** 0.5 * jax.random.normal(key, shape)
  )
  return {
      "in": normal(one, 2 * size, hidden),
      "hidden": normal(two, hidden, hidden),
      "out": start * jax.random.normal(three, (hidden, 2)),
      "bias": jnp.array([0.0, _START]),
  }


def pooled(
    query: Float[Array, "B T N H"], positions: Int[Array, "B T"], num: int
) -> Float[Array, "B I"]:
  """Means over heads and the `num` tokens at either end, I = 2 H, float32.

  Args:
    query: Before rotation.
    positions: -1 is padding, at the ends of texts.
    num: As many as there are, in shorter texts.
  """
  num, length = min(num, query.shape[1]), query.shape[1]
  lengths = (positions >= 0).sum(axis=1, keepdims=True)
  step = jnp.arange(num)[None]
  ends = jnp.concatenate([step + 0 * lengths, lengths - 1 - step], axis=1)
  is_in = (ends >= 0) & (ends < lengths)
  ends = jnp.clip(ends, 0, length - 1)[..., None, None]
  read = jnp.take_along_axis(query, ends, axis=1).astype(jnp.float32)
  read = read.mean(axis=2).reshape(len(query), 2, num, -1)
  weight = is_in.reshape(len(query), 2, num, 1).astype(jnp.float32)
  total = jnp.maximum(weight.sum(axis=2), 1)
  return ((read * weight).sum(axis=2) / total).reshape(len(query), -1)


def full_prob(
    params: hooks.Params, read: Float[Array, "B I"]
) -> Float[Array, "B"]:
  """Probability of full, by what was pooled."""
  product = lambda x, name: jnp.einsum("BI,IR->BR", x, params[name])
  inner = jax.nn.gelu(product(read, "in"))
  inner = jax.nn.gelu(product(inner, "hidden"))
  both = product(inner, "out") + params["bias"][None]
  return jax.nn.softmax(both)[:, 1]


def price(
    multipliers: Float[Array, "2"], sparse: Float[Array, ""], target: float
) -> Float[Array, ""]:
  """What missing the target costs; its gradient by multipliers is turned.

  Args:
    multipliers: lambda_1 and lambda_2.
    sparse: s, share of layers and texts that is sparse.
    target: s*.
  """
  apart = sparse - target
  # Descent by the parameters is ascent by the multipliers.
  first, second = 2 * jax.lax.stop_gradient(multipliers) - multipliers
  return first * jnp.abs(apart) + second * jnp.square(apart)
