"""The task of `recall`: what a relation says of a subject."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from joma.studies import texts

# Tokens without meaning that there are.
_FILLERS = 8


class Pairs(NamedTuple):
  """Every fact, and one of the same relation with another answer.

  Attributes:
    tokens: Of the facts.
    answers: Tokens that are right behind them.
    relations: From 0.
    other_tokens: Of another subject of the same half.
    other_answers: Its answers.
    is_first_half: Of the subjects.
  """

  tokens: Int[Array, "B T"]
  answers: Int[Array, "B"]
  relations: Int[Array, "B"]
  other_tokens: Int[Array, "B T"]
  other_answers: Int[Array, "B"]
  is_first_half: Bool[Array, "B"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Associations:
  """Texts `first last filler ... relation`, and their answers: `texts.Task`.

  A subject is a first and a last name, which others have too, so that neither
  says who it is. Each relation has answers of its own, and what it says of
  subjects is drawn once for all seeds.

  Attributes:
    num_names: First names, and as many last names; an even number.
    num_relations: Relations.
    num_values: Answers of each relation.
    num_filler: Words without meaning of a text.
  """

  num_names: int
  num_relations: int
  num_values: int
  num_filler: int

  @property
  def length(self) -> int:
    """Tokens of a text."""
    return self.num_filler + 3

  @property
  def num_subjects(self) -> int:
    """Pairs of a first and a last name."""
    return self.num_names**2

  @property
  def vocab_size(self) -> int:
    """Names, relations, fillers, then the answers of each relation."""
    return self._first_value + self.num_relations * self.num_values

  @property
  def _first_value(self) -> int:
    return 2 * self.num_names + self.num_relations + _FILLERS

  def facts(self) -> Int[Array, "S R"]:
    """The token that is right for each subject and relation."""
    shape = (self.num_subjects, self.num_relations)
    value = jax.random.randint(jax.random.key(0), shape, 0, self.num_values)
    own = self.num_values * jnp.arange(self.num_relations)[None]
    return self._first_value + own + value

  def texts_of(
      self, key: Array, subject: Int[Array, "B"], relation: Int[Array, "B"]
  ) -> Int[Array, "B T"]:
    """Texts of these subjects and relations, with fillers drawn."""
    shape = (len(subject), self.num_filler)
    filler = jax.random.randint(key, shape, 0, _FILLERS)
    filler += 2 * self.num_names + self.num_relations
    first, last = jnp.divmod(subject, self.num_names)
    names = jnp.stack([first, self.num_names + last], axis=1)
    asked = (2 * self.num_names + relation)[:, None]
    return jnp.concatenate([names, filler, asked], axis=1)

  def draw(self, key: jax.Array, num_texts: int) -> texts.Texts:
    """Draws facts; the last token is asked."""
    keys = jax.random.split(key, 3)
    subject = jax.random.randint(keys[0], (num_texts,), 0, self.num_subjects)
    relation = jax.random.randint(keys[1], (num_texts,), 0, self.num_relations)
    tokens = self.texts_of(keys[2], subject, relation)
    answers = self.facts()[subject, relation]
    is_last = jnp.arange(self.length)[None] == self.length - 1
    is_last = jnp.broadcast_to(is_last, tokens.shape)
    targets = jnp.where(is_last, answers[:, None], 0)
    return texts.Texts(tokens, targets, is_last, is_last)

  def pairs(self, key: jax.Array) -> Pairs:
    """Every fact beside another of its relation and half.

    Halves are drawn. The other subject is drawn too, until its answer is
    another one.
    """
    keys = jax.random.split(key, 4)
    half, facts = self.num_subjects // 2, self.facts()
    # Row by row a half: place i of the order is in half i // half.
    order = jax.random.permutation(keys[0], self.num_subjects)
    place, relation = (
        x.ravel()
        for x in jnp.meshgrid(
            jnp.arange(self.num_subjects),
            jnp.arange(self.num_relations),
            indexing="ij",
        )
    )
    subject = order[place]
    shape = (len(place), half)
    others = jnp.broadcast_to(order.reshape(2, half)[place // half], shape)
    others = jax.random.permutation(keys[1], others, axis=1, independent=True)
    answers = facts[subject, relation]
    differs = facts[others, relation[:, None]] != answers[:, None]
    first = differs.argmax(axis=1)[:, None]
    chosen = jnp.take_along_axis(others, first, axis=1)[:, 0]
    return Pairs(
        tokens=self.texts_of(keys[2], subject, relation),
        answers=answers,
        relations=relation,
        other_tokens=self.texts_of(keys[3], chosen, relation),
        other_answers=facts[chosen, relation],
        is_first_half=place < half,
    )
