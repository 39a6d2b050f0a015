"""The task of `retrieval`: facts, then questions about some of them."""

import dataclasses

import jax
import jax.numpy as jnp

from joma.studies import texts

# The full stop, and the first of the keys, which values follow.
END, FIRST_KEY = 0, 1
# Tokens of a fact, and of a question.
SIZE = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
  """Facts, then questions about some of them: `texts.Task`.

  Attributes:
    num_facts: Of a text, no key twice.
    num_asked: Questions.
    num_keys: Keys that there are.
    num_values: Values that there are.
  """

  num_facts: int
  num_asked: int
  num_keys: int
  num_values: int

  def draw(self, key: jax.Array, num_texts: int) -> texts.Texts:
    """Draws texts; each key of a question is asked."""
    keys = jax.random.split(key, 3)
    permute = lambda key, count, num: jax.vmap(
        lambda key: jax.random.permutation(key, count)[:num]
    )(jax.random.split(key, num_texts))
    key_of = FIRST_KEY + permute(keys[0], self.num_keys, self.num_facts)
    value_of = jax.random.randint(keys[1], key_of.shape, 0, self.num_values)
    value_of += FIRST_KEY + self.num_keys
    asked = permute(keys[2], self.num_facts, self.num_asked)
    of_asked = lambda x: jnp.take_along_axis(x, asked, axis=1)
    facts = jnp.stack([key_of, value_of, jnp.full_like(key_of, END)], axis=-1)
    questions = jnp.stack([of_asked(key_of)] * SIZE, axis=-1)
    tokens = jnp.concatenate([facts, questions], axis=1)
    tokens = tokens.reshape(num_texts, -1)
    answers = jnp.repeat(of_asked(value_of), SIZE, axis=1)
    targets = jnp.zeros_like(tokens).at[:, -answers.shape[1] :].set(answers)
    is_asked = jnp.arange(tokens.shape[1]) >= SIZE * self.num_facts
    is_asked = jnp.broadcast_to(is_asked[None], tokens.shape)
    return texts.Texts(tokens, targets, is_asked, is_asked)
