"""Distils a model into one whose layers share, in two stages.

  stage 1   mean over tokens of  CE(student | argmax of the teacher)
            + KL(teacher | student) + ||h - h'||^2 / ||h'||^2
  stage 2   CE(student | text)

with h, and h' of the teacher, what the last layer leaves in the residual stream
(EchoAtt, https://arxiv.org/abs/2409.14595). Stage 1 asks the teacher alone: it
needs no text but tokens that the teacher can read.

Letters: B texts, T tokens, N steps.
"""

from collections.abc import Iterable
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree
import optax

from joma.transformer import hooks
from joma.transformer import layer_hooks
from joma.transformer import model as models
from joma.transformer.training import lm_step
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require


def student_of(model: models.Transformer, params: PyTree) -> PyTree:
  """Returns a teacher's parameters without what the student has not.

  Args:
    model: The student, of the teacher's shape.
    params: The teacher's.
  """
  kept = dict(params)
  for layer in range(model.config.num_layers):
    share: hooks.Share | None = layer_hooks.of_layer(model.config, layer).share
    if share is None or share.is_source(model.config, layer):
      continue
    name = f"layers_{layer}"
    made = ("query", "key", "query_norm", "key_norm")
    attn = {k: v for k, v in params[name]["attn"].items() if k not in made}
    kept[name] = {**params[name], "attn": attn}
  return kept


def text_loss(
    model: models.Transformer, params: PyTree, tokens: Int[Array, "B T"]
) -> Float[Array, ""]:
  """Mean cross-entropy of the tokens behind the first, in nats."""
  logits: Any = model.apply({"params": params}, tokens[:, :-1])
  return lm_step.token_losses(logits, tokens[:, 1:]).mean()


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
  hard = lm_step.token_losses(logits, want.argmax(axis=-1)).mean()
  log_want = jax.nn.log_softmax(want)
  apart = log_want - jax.nn.log_softmax(logits)
  soft = (jnp.exp(log_want) * apart).sum(axis=-1).mean()
  size = jnp.square(h_want).sum(axis=-1)
  far = jnp.square(h - h_want).sum(axis=-1) / jnp.maximum(size, 1e-6)
  return hard + soft + far.mean()


def train(
    model: models.Transformer,
    params: PyTree,
    batches: Iterable[Int[Array, "B T"]],
    lr: float,
    teacher: tuple[models.Transformer, PyTree] | None = None,
) -> tuple[PyTree, list[float]]:
  """Takes a step of Adam on each batch.

  Args:
    model: The student.
    params: Its parameters.
    batches: Tokens, all of one shape.
    lr: Learning rate.
    teacher: Its model and parameters, stage 1; None is stage 2.

  Returns:
    Parameters, and the loss before each step.

  Raises:
    UserError: Training diverged: the last loss is NaN, or ten times the first
      one and 10 nats or more; or a parameter's square overflows.
  """
  state, losses = optax.adam(lr).init(params), []
  teacher_model, teacher_params = teacher or (None, None)
  rate = jnp.asarray(lr)
  for tokens in batches:
    arrays = (params, state, teacher_params, tokens, rate)
    params, state, loss = _step(model, teacher_model, *arrays)
    losses.append(loss)
  found = [float(loss) for loss in losses]
  if found and not found[-1] < 10.0 * max(found[0], 1.0):  # Of NaN, too.
    raise errors.UserError(
        f"training diverged with rate={lr:g}: its loss went from"
        f" {found[0]:.4g} to {found[-1]:.4g}. Use a smaller rate, in a new"
        " workdir."
    )
  require.bounded("rate", lr, jax.tree.leaves(params))
  return params, found


@functools.partial(jax.jit, static_argnums=(0, 1))
def _step(
    model: models.Transformer,
    teacher: models.Transformer | None,
    params: PyTree,
    state: PyTree,
    teacher_params: PyTree,
    tokens: Int[Array, "B T"],
    lr: Float[Array, ""],
) -> tuple[PyTree, PyTree, Float[Array, ""]]:
  def loss_of(params: PyTree) -> Float[Array, ""]:
    if teacher is None:
      return text_loss(model, params, tokens)
    return teacher_loss(model, params, teacher, teacher_params, tokens)

  loss, grads = jax.value_and_grad(loss_of)(params)
  updates, state = optax.adam(lr).update(grads, state)
  return optax.apply_updates(params, updates), state, loss


def _read(
    model: models.Transformer, params: PyTree, tokens: Int[Array, "B T"]
) -> tuple[Float[Array, "B T V"], Float[Array, "B T D"]]:
  """Logits, and what the last layer leaves in the residual stream."""
  found: Any = model.apply({"params": params}, tokens, mutable="intermediates")
  logits, seen = found
  last = seen["intermediates"][f"layers_{model.config.num_layers - 1}"]
  return logits, last["resid_mlp"][0].astype(jnp.float32)
