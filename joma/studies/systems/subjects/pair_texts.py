"""The texts, the relation and the models of `pairs`.

A text has one word of value among words without meaning, and beats another
where its value is the larger one. Values of a pair are unlike, so that what is
symmetric in the two texts is right on half of the pairs, and their order.

Letters: B pairs, T tokens of a text, D width, M values.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree
import optax

from joma.systems.readouts import pair_head
from joma.systems.readouts import pooling
from joma.transformer import config as configs
from joma.transformer import model as models
from joma.transformer import probes

# Words without meaning that there are, and the mark between two texts.
_FILLERS = 8

Kind = Literal["features", "dot"]


class Pairs(NamedTuple):
  """Pairs of texts, and whether the first beats the second."""

  one: Int[Array, "B T"]
  two: Int[Array, "B T"]
  beats: Bool[Array, "B"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
  """Draws pairs.

  Attributes:
    num_values: M.
    num_tokens: T.
  """

  num_values: int
  num_tokens: int

  @property
  def vocab_size(self) -> int:
    """Values, words without meaning, and the mark."""
    return self.num_values + _FILLERS + 1

  def draw(self, key: Array, num_pairs: int) -> Pairs:
    """Draws pairs of unlike values."""
    keys = jax.random.split(key, 4)
    shape = (2, num_pairs, self.num_tokens)
    fill = self.num_values + jax.random.randint(keys[0], shape, 0, _FILLERS)
    place = jax.random.randint(keys[1], shape[:2], 0, self.num_tokens)
    first = jax.random.randint(keys[2], (num_pairs,), 0, self.num_values)
    apart = jax.random.randint(keys[3], (num_pairs,), 1, self.num_values)
    values = jnp.stack([first, (first - apart) % self.num_values])
    is_place = jnp.arange(self.num_tokens)[None, None] == place[..., None]
    one, two = jnp.where(is_place, values[..., None], fill)
    return Pairs(one, two, values[0] > values[1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossEncoder:
  """Reads both texts at once: a `training.Problem`.

  Attributes:
    order: Draws pairs.
    batch_size: Pairs of a step.
    width: D.
  """

  order: Order
  batch_size: int
  width: int

  @property
  def model(self) -> models.Transformer:
    """The Transformer; its first logit of the last token is the score."""
    return _transformer(self.order, self.width)

  def init(self, key: Array) -> PyTree:
    """Draws the parameters."""
    return self.model.init(key, jnp.zeros((1, 2), jnp.int32))["params"]

  def score(
      self, params: PyTree, one: Int[Array, "B T"], two: Int[Array, "B T"]
  ) -> Float[Array, "B"]:
    """Logits of the first text's beating the second."""
    mark = jnp.full((len(one), 1), self.order.vocab_size - 1)
    tokens = jnp.concatenate([one, mark, two, mark], axis=1)
    logits: Any = self.model.apply({"params": params}, tokens)
    return logits[:, -1, 0]

  def loss(self, params: PyTree, key: Array) -> tuple[Array, Array]:
    """Cross-entropy, and the share of pairs that are right."""
    pairs = self.order.draw(key, self.batch_size)
    score = self.score(params, pairs.one, pairs.two)
    loss = optax.sigmoid_binary_cross_entropy(score, pairs.beats)
    return loss.mean(), ((score > 0) == pairs.beats).mean()


# By identity: it holds arrays, and must be static.
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Student:
  """One encoder for both texts and a head, taught: a `training.Problem`.

  Attributes:
    teacher: The cross-encoder.
    taught: Its parameters of each seed.
    kind: Of the head.
  """

  teacher: CrossEncoder
  taught: Mapping[int, PyTree]
  kind: Kind

  @property
  def head(self) -> pair_head.PairHead:
    """The head."""
    return pair_head.PairHead(self.kind, 4 * self.teacher.width)

  def init(self, key: Array) -> PyTree:
    """Draws the parameters, those of the seed's teacher beside them."""
    keys = jax.random.split(key, 2)
    vector = jnp.zeros((1, self.teacher.width))
    return {
        "encoder": self.teacher.init(keys[0]),
        "head": self.head.init(keys[1], vector, vector)["params"],
        # A run's key is that of its seed.
        "teacher": self.taught[int(jax.random.key_data(key)[-1])],
    }

  def vectors(
      self, params: PyTree, tokens: Int[Array, "B T"]
  ) -> Float[Array, "B D"]:
    """Means of the last layer, each text by itself."""
    model = self.teacher.model
    _, seen = model.apply(
        {"params": params["encoder"]}, tokens, mutable="intermediates"
    )
    resid = probes.stream_of(seen, model.config)
    return pooling.pool("mean", resid, jnp.full(len(tokens), tokens.shape[1]))

  def score(
      self, params: PyTree, one: Int[Array, "B T"], two: Int[Array, "B T"]
  ) -> Float[Array, "B"]:
    """What the student says in the place of the teacher."""
    vectors = self.vectors(params, jnp.concatenate([one, two]))
    first, second = jnp.split(vectors, 2)
    scores: Any = self.head.apply({"params": params["head"]}, first, second)
    return scores

  def loss(self, params: PyTree, key: Array) -> tuple[Array, Array]:
    """Squared difference from the teacher, and the share that is right."""
    pairs = self.teacher.order.draw(key, self.teacher.batch_size)
    taught = jax.lax.stop_gradient(params["teacher"])
    want = self.teacher.score(taught, pairs.one, pairs.two)
    score = self.score(params, pairs.one, pairs.two)
    is_right = (score > 0) == pairs.beats
    return pair_head.distil_loss(score, want), is_right.mean()


def _transformer(order: Order, width: int) -> models.Transformer:
  config = configs.TransformerConfig(
      vocab_size=order.vocab_size,
      num_layers=2,
      embed_dim=width,
      num_heads=2,
      num_kv_heads=2,
      head_dim=width // 2,
      hidden_dim=4 * width,
      tie_embeddings=False,
  )
  return models.Transformer(config, implementation="reference")
