"""The task of `drift`: instructions of a system, and of a user against them.

  system a . .  user . b .  ask     is to be followed by a, or by b

Letters: B texts, T tokens.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from joma.studies import texts
from joma.transformer import config as configs

# Roles of spans; the rest has none.
SYSTEM, USER, NUM_ROLES = 0, 1, 3
# Words without meaning that there are.
_FILLERS = 8
# So that the head is heard in late layers, whose stream is longer.
_GAIN = 6.0


class Pairs(NamedTuple):
  """Texts without a conflict, and with one.

  Attributes:
    without: The user says nothing of meaning.
    conflict: The user says `user`, in the place of one word.
    roles: Of the tokens of both.
    system: What the system says.
    user: What the user says, another one.
  """

  without: Int[Array, "B T"]
  conflict: Int[Array, "B T"]
  roles: Int[Array, "B T"]
  system: Int[Array, "B"]
  user: Int[Array, "B"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instructions:
  """Texts of which half have a conflict: `texts.Task`.

  Attributes:
    num_values: What an instruction may say.
    span: Words of each role.
    obeys: Whom the answer follows in a conflict, `SYSTEM` or `USER`.
  """

  num_values: int
  span: int
  obeys: int = USER

  @property
  def length(self) -> int:
    """Tokens of a text."""
    return 2 * self.span + 3

  @property
  def vocab_size(self) -> int:
    """Instructions, words without meaning, and three marks."""
    return self.num_values + _FILLERS + 3

  @property
  def ask(self) -> int:
    """The token that is to be followed by the answer."""
    return self.vocab_size - 1

  def pairs(self, key: Array, num_texts: int) -> Pairs:
    """Draws texts, each with and without a conflict."""
    keys = jax.random.split(key, 4)
    fill = jax.random.randint(keys[0], (2, num_texts, self.span), 0, _FILLERS)
    fill += self.num_values
    place = jax.random.randint(keys[1], (2, num_texts), 0, self.span)
    system = jax.random.randint(keys[2], (num_texts,), 0, self.num_values)
    shift = jax.random.randint(keys[3], (num_texts,), 1, self.num_values)
    user = (system + shift) % self.num_values
    said = jnp.stack([system, user])
    is_place = jnp.arange(self.span)[None, None] == place[..., None]
    spoken = jnp.where(is_place, said[..., None], fill)
    mark = lambda i: jnp.full((num_texts, 1), self.vocab_size - 3 + i)
    join = lambda user: jnp.concatenate(
        [mark(0), spoken[0], mark(1), user, mark(2)], axis=1
    )
    sizes = jnp.array([self.span + 1, self.span + 1, 1])
    roles = jnp.repeat(
        jnp.arange(NUM_ROLES), sizes, total_repeat_length=self.length
    )
    roles = jnp.broadcast_to(roles[None], (num_texts, self.length))
    return Pairs(join(fill[1]), join(spoken[1]), roles, system, user)

  def draw(self, key: Array, num_texts: int) -> texts.Texts:
    """Draws texts, every other one with a conflict; the last token is asked."""
    drawn = self.pairs(key, num_texts)
    has = jnp.arange(num_texts) % 2 == 1
    tokens = jnp.where(has[:, None], drawn.conflict, drawn.without)
    wins = has & (self.obeys == USER)
    answers = jnp.where(wins, drawn.user, drawn.system)
    is_last = jnp.arange(self.length)[None] == self.length - 1
    is_last = jnp.broadcast_to(is_last, tokens.shape)
    targets = jnp.where(is_last, answers[:, None], 0)
    return texts.Texts(tokens, targets, is_last, is_last)


def plant(
    params: PyTree,
    config: configs.TransformerConfig,
    task: Instructions,
    layer: int,
    head: int,
    key: Array,
) -> PyTree:
  """Makes a head look from the asking token at instructions of both roles.

  Instructions and the asking token get a direction each, of the length of an
  embedding; the head's key reads the first and its query the second into one
  direction of the head, `_GAIN` times as long as the drawn ones do. All other
  parameters stay.

  Args:
    params: Of a Transformer that was drawn.
    config: Its shape.
    task: Which tokens are instructions.
    layer: Of the head.
    head: Which.
    key: Draws the directions.
  """
  keys, width = jax.random.split(key, 3), config.embed_dim
  unit = lambda key, size: (lambda x: x / jnp.linalg.norm(x))(
      jax.random.normal(key, (size,))
  )
  says, asks = unit(keys[0], width), unit(keys[1], width)
  embed = params["token_embed"]["embedding"]
  embed = embed.at[: task.num_values].add(says[None]).at[task.ask].add(asks)
  own = params[f"layers_{layer}"]
  line = unit(keys[2], config.head_dim)
  attn = dict(own["attn"])
  for name, read in (("key", says), ("query", asks)):
    kernel = attn[name]["kernel"]
    new = kernel.at[:, head].set(_GAIN * jnp.outer(read, line))
    attn[name] = {**attn[name], "kernel": new}
  return {
      **params,
      "token_embed": {"embedding": embed},
      f"layers_{layer}": {**own, "attn": attn},
  }
