"""Distils a model into one whose layers share, in two stages.

Stage 1 asks the teacher alone, stage 2 the text (EchoAtt,
https://arxiv.org/abs/2409.14595); what each minimizes is in `stage_losses`.

Letters: B texts, T tokens, N steps.
"""

from collections.abc import Iterable
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree
import optax

from joma.systems.reuse import stage_losses
from joma.transformer import hooks
from joma.transformer import layer_hooks
from joma.transformer import model as models
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
      return stage_losses.text_loss(model, params, tokens)
    return stage_losses.teacher_loss(
        model, params, teacher, teacher_params, tokens
    )

  loss, grads = jax.value_and_grad(loss_of)(params)
  updates, state = optax.adam(lr).update(grads, state)
  return optax.apply_updates(params, updates), state, loss
