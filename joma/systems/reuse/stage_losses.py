"""What the two stages of EchoAtt's distillation minimize.

  stage 1   mean over tokens of  CE(student | argmax of the teacher)
            + KL(teacher | student) + ||h - h'||^2 / ||h'||^2
  stage 2   CE(student | text)

with h, and h' of the teacher, what the last layer leaves in the residual stream
(https://arxiv.org/abs/2409.14595). Stage 1 needs no text but tokens that the
teacher can read.

Letters: B texts, T tokens, V words, D width.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from joma.transformer import model as models
from joma.transformer.layers import cross_entropy


def text_loss(
    model: models.Transformer, params: PyTree, tokens: Int[Array, "B T"]
) -> Float[Array, ""]:
  """Mean cross-entropy of the tokens behind the first, in nats."""
  logits: Any = model.apply({"params": params}, tokens[:, :-1])
  return cross_entropy.token_losses(logits, tokens[:, 1:]).mean()


def teacher_loss(
    model: models.Transformer,
    params: PyTree,
    teacher: models.Transformer,
    teacher_params: PyTree,
    tokens: Int[Array, "B T"],
) -> Float[Array, ""]:
  """What stage 1 minimizes."""
  logits, h = _read(model, params, tokens)
  want, h_want = jax.lax.stop_gradient(_read(teacher, teacher_params, tokens))
  hard = cross_entropy.token_losses(logits, want.argmax(axis=-1)).mean()
  log_want = jax.nn.log_softmax(want)
  apart = log_want - jax.nn.log_softmax(logits)
  soft = (jnp.exp(log_want) * apart).sum(axis=-1).mean()
  size = jnp.square(h_want).sum(axis=-1)
  far = jnp.square(h - h_want).sum(axis=-1) / jnp.maximum(size, 1e-6)
  return hard + soft + far.mean()


def _read(
    model: models.Transformer, params: PyTree, tokens: Int[Array, "B T"]
) -> tuple[Float[Array, "B T V"], Float[Array, "B T D"]]:
  """Logits, and what the last layer leaves in the residual stream."""
  found: Any = model.apply({"params": params}, tokens, mutable="intermediates")
  logits, seen = found
  last = seen["intermediates"][f"layers_{model.config.num_layers - 1}"]
  return logits, last["resid_mlp"][0].astype(jnp.float32)
