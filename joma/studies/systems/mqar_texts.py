"""Texts of few and of many pairs, whose keys are asked: associative recall.

Letters: B texts, T tokens, V tokens of the vocabulary, P pairs of a text, G
numbers of pairs that a step has side by side.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from joma.studies import texts
from joma.transformer.layers import cross_entropy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs:
  """Pairs, then their keys again and again, in any order: `texts.Task`.

  Attributes:
    seq_len: T, more than 2 P.
    num_pairs: P of each kind of text, G numbers; a draw has as many of each,
      kind by kind.
    num_keys: Keys are tokens from 0, values those behind.
    num_values: How many.
  """

  seq_len: int
  num_pairs: tuple[int, ...]
  num_keys: int
  num_values: int

  def draw(self, key: Array, num_texts: int) -> texts.Texts:
    """Draws texts, a multiple of G."""
    keys = jax.random.split(key, len(self.num_pairs))
    drawn = [
        self.draw_kind(one, num_texts // len(keys), num_pairs)
        for one, num_pairs in zip(keys, self.num_pairs, strict=True)
    ]
    return texts.Texts(*map(jnp.concatenate, zip(*drawn, strict=True)))

  def draw_kind(
      self, key: Array, num_texts: int, num_pairs: int
  ) -> texts.Texts:
    """Draws texts of so many pairs; keys behind the first ones are asked."""
    keys = jax.random.split(key, (3, num_texts))
    choose = lambda keys, count: jax.vmap(
        lambda key: jax.random.permutation(key, count)[:num_pairs]
    )(keys)
    key_of = choose(keys[0], self.num_keys)
    value_of = self.num_keys + choose(keys[1], self.num_values)
    first = jnp.stack([key_of, value_of], axis=-1).reshape(num_texts, -1)
    rest = self.seq_len // 2 - num_pairs
    which = jax.random.randint(keys[2, 0], (num_texts, rest), 0, num_pairs)
    take = lambda x: jnp.take_along_axis(x, which, axis=1)
    again = jnp.stack([take(key_of), take(value_of)], axis=-1)
    tokens = jnp.concatenate([first, again.reshape(num_texts, -1)], axis=1)
    targets = jnp.roll(tokens, -1, axis=1)
    place = jnp.arange(self.seq_len)[None]
    is_asked = (place >= 2 * num_pairs) & (place % 2 == 0)
    is_asked = jnp.broadcast_to(is_asked, tokens.shape)
    return texts.Texts(tokens, targets, is_asked, is_asked)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairsLearner(texts.Learner):
  """A learner whose loss counts each kind of text alike."""

  task: Pairs

  def measured(
      self, logits: Float[Array, "B T V"], texts: texts.Texts
  ) -> tuple[Float[Array, ""], Float[Array, "G"]]:
    """Mean loss of the kinds, and the share of right answers of each."""
    num_kinds = len(self.task.num_pairs)
    losses = cross_entropy.token_losses(logits, texts.targets)
    is_right = logits.argmax(axis=-1) == texts.targets
    of_kinds = lambda x: x.reshape(num_kinds, -1).sum(axis=1)
    count = of_kinds(texts.is_asked)
    loss = of_kinds(losses * texts.is_asked) / count
    return loss.mean(), of_kinds(is_right & texts.is_asked) / count


def distances(found: texts.Texts) -> Int[Array, "B T"]:
  """Tokens since each key was there last; of no key, and of first ones, T."""
  length = found.tokens.shape[1]
  place = jnp.arange(length)
  same = found.tokens[:, :, None] == found.tokens[:, None]
  before = same & (place[:, None] > place[None])[None]
  last = jnp.where(before, place[None, None], place[:, None] - length)
  return place[None] - last.max(axis=-1)
