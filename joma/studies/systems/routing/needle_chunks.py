"""The task of `nats`: needle chunks of pairs, among chunks of filler.

A needle chunk is pairs of a key and its value; a filler chunk is one symbol
again and again, so that it foretells itself. Behind all chunks every key is
asked several times, in an order drawn for each, and its value said.

Letters: B texts, T tokens, C chunks.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from joma.studies import texts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needles:
  """Chunks of pairs among filler, then what is asked: `texts.Task`.

  Attributes:
    chunk: Tokens of a chunk.
    num_chunks: Chunks before what is asked.
    num_needles: Of them those that are pairs.
    num_asked: Times that each key is asked.
    num_symbols: Keys are tokens from 0, values those behind, then filler.
  """

  chunk: int
  num_chunks: int
  num_needles: int
  num_asked: int
  num_symbols: int

  @property
  def num_pairs(self) -> int:
    """Of a text."""
    return self.num_needles * self.chunk // 2

  @property
  def seq_len(self) -> int:
    """T: chunks, then keys that are asked and their values."""
    return self.num_chunks * self.chunk + 2 * self.num_asked * self.num_pairs

  def draw(self, key: Array, num_texts: int) -> texts.Texts:
    """Draws texts; keys behind the chunks are asked, scored the first time."""
    return self.drawn(key, num_texts)[0]

  def drawn(
      self, key: Array, num_texts: int
  ) -> tuple[texts.Texts, Bool[Array, "B C"]]:
    """The same, and which chunks are needles [B, C]."""
    keys = jax.random.split(key, (4 + self.num_asked, num_texts))
    order = lambda keys, count, num: jax.vmap(
        lambda key: jax.random.permutation(key, count)[:num]
    )(keys)
    size, num = self.num_symbols, self.num_pairs
    key_of = order(keys[0], size, num)
    value_of = size + order(keys[1], size, num)
    symbol = jax.vmap(
        lambda key: jax.random.randint(key, (self.num_chunks, 1), 0, size)
    )(keys[2])
    filler = jnp.repeat(2 * size + symbol, self.chunk, axis=2)
    place = order(keys[3], self.num_chunks, self.num_needles)
    both = lambda one, two: jnp.stack([one, two], axis=-1).reshape(
        num_texts, -1
    )
    pairs = both(key_of, value_of).reshape(num_texts, -1, self.chunk)
    put = jax.vmap(lambda chunks, place, what: chunks.at[place].set(what))
    chunks = put(filler, place, pairs).reshape(num_texts, -1)
    is_needle = put(
        jnp.zeros(filler.shape[:2], bool), place, jnp.ones_like(place, bool)
    )
    again = jnp.concatenate([order(k, num, num) for k in keys[4:]], axis=1)
    take = lambda x: jnp.take_along_axis(x, again, axis=1)
    ends = both(take(key_of), take(value_of))
    tokens = jnp.concatenate([chunks, ends], axis=1)
    targets = jnp.roll(tokens, -1, axis=1)
    at = jnp.arange(tokens.shape[1])[None] - chunks.shape[1]
    is_asked = jnp.broadcast_to((at >= 0) & (at % 2 == 0), tokens.shape)
    # Asked again, an answer stands near.
    is_scored = is_asked & (at < 2 * num)
    return texts.Texts(tokens, targets, is_asked, is_scored), is_needle
