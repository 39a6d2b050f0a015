"""Transformers that learn tasks of symbols, as `training.Problem`.

Letters: B texts, T tokens, N heads, L layers.
"""

import dataclasses
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from joma.transformer import config as configs
from joma.transformer import model as models
from joma.transformer.layers import cross_entropy
from joma.transformer.training import lm_step


class Texts(NamedTuple):
  """Texts, and what is asked of them.

  Attributes:
    tokens: [B, T].
    targets: What each position is to say [B, T].
    is_asked: Where it counts [B, T].
    is_scored: Where the share of right answers is followed [B, T].
  """

  tokens: Int[Array, "B T"]
  targets: Int[Array, "B T"]
  is_asked: Bool[Array, "B T"]
  is_scored: Bool[Array, "B T"]


@runtime_checkable
class Task(Protocol):
  """Draws texts; a frozen dataclass, for it is static."""

  def draw(self, key: Array, num_texts: int) -> Texts:
    """Returns new texts."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learner:
  """A Transformer and its task: a `training.Problem`.

  Attributes:
    model: The Transformer's config.
    task: Draws texts.
    batch_size: Texts of a step.
    implementation: Of the ops: for few tokens of attention the plain form.
  """

  model: configs.TransformerConfig
  task: Task
  batch_size: int
  implementation: Literal["reference", "xla"] = "reference"

  @property
  def transformer(self) -> models.Transformer:
    """The model."""
    return models.Transformer(self.model, implementation=self.implementation)

  def init(self, key: Array) -> PyTree:
    """Draws the parameters."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    return self.transformer.init(key, tokens)["params"]

  def loss(self, params: PyTree, key: Array) -> tuple[Array, Array]:
    """Mean cross-entropy where it counts, and the share of right answers."""
    texts = self.task.draw(key, self.batch_size)
    logits, extra = lm_step.apply_with_losses(
        self.transformer, params, texts.tokens
    )
    loss, score = self.measured(logits, texts)
    return loss if extra is None else loss + extra, score

  def measured(
      self, logits: Float[Array, "B T V"], texts: Texts
  ) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The same of logits."""
    losses = cross_entropy.token_losses(logits, texts.targets)
    mean = lambda x, where: (x * where).sum() / jnp.maximum(where.sum(), 1)
    is_right = logits.argmax(axis=-1) == texts.targets
    return mean(losses, texts.is_asked), mean(is_right, texts.is_scored)

  def look(
      self, params: PyTree, key: Array, num_texts: int
  ) -> tuple[Float[Array, ""], Float[Array, ""], Texts, Any]:
    """Loss and score of new texts, the texts, and what the model has sown."""
    texts = self.task.draw(key, num_texts)
    logits, seen = self.transformer.apply(
        {"params": params}, texts.tokens, mutable="intermediates"
    )
    return *self.measured(logits, texts), texts, seen["intermediates"]
