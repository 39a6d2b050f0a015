"""Markov chains with transitions of their own, and two layers that read them.

See `joma.studies.theories.induction`.

Letters: B sequences, K symbols, S and T symbols of a sequence.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np


def draw_chains(
    key: Array, num: int, num_symbols: int, length: int
) -> Int[Array, "B _"]:
  """Draws sequences, each from transitions of its own, the start evenly."""
  for_rows, for_first, for_steps = jax.random.split(key, 3)
  shape = (num, num_symbols)
  rows = jax.random.dirichlet(for_rows, jnp.ones(num_symbols), shape)
  first = jax.random.randint(for_first, (num,), 0, num_symbols)

  def step(symbol: Array, place: Array) -> tuple[Array, Array]:
    chances = jnp.cumsum(rows[jnp.arange(num), symbol], axis=1)
    following = (place[:, None] > chances[:, :-1]).sum(axis=1)
    return following, following

  _, rest = jax.lax.scan(
      step, first, jax.random.uniform(for_steps, (length, num))
  )
  return jnp.concatenate([first[None], rest]).T


def references(
    chains: Int[np.ndarray, "B _"], num_symbols: int
) -> dict[str, float]:
  """Mean losses in nats of what counts alone can say, each count one larger.

  For the bigram this is the best that can be done: a row drawn evenly from all
  distributions is, after counts c, expected to be (c + 1) / (sum c + k).
  """
  losses = {"unigram": 0.0, "bigram": 0.0}
  number, length = len(chains), chains.shape[1] - 1
  rows = np.arange(number)
  seen = np.ones((number, num_symbols))
  pairs = np.ones((number, num_symbols, num_symbols))
  for i in range(length):
    now, following = chains[:, i], chains[:, i + 1]
    seen[rows, now] += 1
    for name, count in (("unigram", seen), ("bigram", pairs[rows, now])):
      share = count[rows, following] / count.sum(axis=1)
      losses[name] -= float(np.log(share).mean()) / length
    pairs[rows, now, following] += 1
  return losses


def predict(
    params: Mapping[str, Array], chains: Int[Array, "B _"]
) -> Float[Array, "B T K"]:
  """Log probabilities of the next symbol at every place."""
  symbols = jax.nn.one_hot(chains[:, :-1], len(params["match"]))
  previous = distance_weights(params["distance"]) @ symbols
  logits = jnp.einsum("BTK,KJ,BSJ->BTS", symbols, params["match"], previous)
  is_past = jnp.tril(jnp.ones(logits.shape[1:], bool))
  weights = jax.nn.softmax(jnp.where(is_past[None], logits, -jnp.inf), axis=-1)
  floor = symbols.shape[2] / jnp.arange(1, symbols.shape[1] + 1)[:, None]
  read = jnp.log(weights @ symbols + floor[None])
  return jax.nn.log_softmax(params["strength"] * read)


def distance_weights(
    distance: Float[Array, "T"],
) -> Float[Array, "T T"]:
  """Attention of the first layer, row i of query i."""
  places = jnp.arange(len(distance))
  apart = places[:, None] - places[None, :]
  logits = jnp.where(apart >= 0, distance[jnp.abs(apart)], -jnp.inf)
  return jax.nn.softmax(logits, axis=-1)


def mean_loss(
    params: Mapping[str, Array], chains: Int[Array, "B _"]
) -> Float[Array, ""]:
  """Cross-entropy over all places, in nats."""
  log_probs = predict(params, chains)
  return -jnp.take_along_axis(log_probs, chains[:, 1:, None], axis=2).mean()


def formed(params: Mapping[str, Array]) -> dict[str, Array]:
  """How far each layer is from chance (0) to certain (1).

  Layer 1: the last query's attention on the symbol before. Layer 2: on a symbol
  whose h is its own, one of each kind at choice.
  """
  distance, match = params["distance"], params["match"]
  size = len(match)
  on_previous = jax.nn.softmax(distance)[1]
  own = jnp.trace(match) / size
  others = (match.sum() - jnp.trace(match)) / (size * (size - 1))
  on_match = jax.nn.sigmoid(own - others - jnp.log(size - 1.0))
  away = lambda share, chance: (share - chance) / (1 - chance)
  return {
      "layer 1": away(on_previous, 1 / len(distance)),
      "layer 2": away(on_match, 1 / size),
  }
