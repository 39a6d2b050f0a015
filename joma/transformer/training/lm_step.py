"""Steps of a language-model run, as pure functions of its state.

The same functions serve one device, a mesh, and `pmap`, whose axis then has the
name `axis_name`. The batches of several steps are one `Batch` with leaves
[N, B, T].

Letters: B batch, T positions, V vocabulary, N steps, L layers.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree
import optax

from joma.transformer import model as model_lib
from joma.transformer import sharding
from joma.transformer.text import batches as batches_lib
from joma.transformer.training import group_penalty
from joma.transformer.training import init as init_lib
from joma.transformer.training import lm_config
from joma.transformer.training import optimizer as optimizer_lib
from kernels_pallas import implementations
from kernels_pallas import masks


class TrainState(NamedTuple):
  """What a run carries from step to step."""

  step: Int[Array, ""]
  params: PyTree
  opt_state: PyTree


@dataclasses.dataclass(frozen=True)
class Task:
  """What a run does; static.

  Attributes:
    config: Settings.
    model: The Transformer.
    optimizer: Its optimizer.
  """

  config: lm_config.LmConfig
  model: model_lib.Transformer
  optimizer: optimizer_lib.Optimizer


# The same object again, so that what is compiled for it is found.
@functools.lru_cache(maxsize=8)
def make_task(
    config: lm_config.LmConfig,
    num_steps: int,
    steps_per_epoch: int,
    implementation: implementations.Implementation | None = None,
) -> Task:
  """The task of a run of known length.

  Args:
    config: Settings.
    num_steps: Steps of the run.
    steps_per_epoch: Steps after which the text begins again.
    implementation: Of attention, see `kernels_pallas.implementations`.
  """
  model = model_lib.Transformer(
      config.model,
      dtype=jnp.dtype(config.dtype),
      implementation=implementation,
      remat=config.remat,
      loss_piece=config.loss_piece,
  )
  optimizer = optimizer_lib.make_optimizer(config, num_steps, steps_per_epoch)
  return Task(config, model, optimizer)


def init(task: Task) -> TrainState:
  """State before the first step, from the seed."""
  params = init_lib.init_params(task.config, task.model)
  return TrainState(
      jnp.zeros((), jnp.int32), params, task.optimizer.init(params)
  )


def loss_sum(
    params: PyTree,
    batch: batches_lib.Batch,
    task: Task,
    dropout_key: Array | None = None,
) -> Float[Array, ""]:
  """Weighted sum of a batch's cross-entropies; drops where a key is given.

  With a key, which says that the model is trained, the losses of its systems
  and the penalty of groups are added, each as often as there are tokens: to the
  mean they add themselves.
  """
  is_training = dropout_key is not None
  with nn.intercept_methods(sharding.keep_split):
    losses, extra = apply_with_losses(
        task.model,
        params,
        batch.inputs,
        targets=batch.targets,
        is_training=is_training,
        rngs={"dropout": dropout_key} if is_training else None,
    )
  total = (losses * batch.weights).sum()
  if is_training and extra is not None:
    total += extra * batch.weights.sum()
  if is_training and task.config.group_penalty:
    norms = group_penalty.penalty(params, task.config.group_size)
    total += task.config.group_penalty * norms * batch.weights.sum()
  return total


def apply_with_losses(
    model: model_lib.Transformer,
    params: PyTree,
    tokens: Int[masks.AnyArray, "B T"],
    **options: Any,
) -> tuple[Float[Array, "B T *V"], Float[Array, ""] | None]:
  """Returns the model's output and the systems' losses; None without systems.

  Args:
    model: The Transformer.
    params: Its parameters.
    tokens: As in `model.Transformer`.
    **options: Of `model.apply`; with `targets` the output is each token's loss.
  """
  variables = {"params": params}
  if not model.config.attention:
    out: Any = model.apply(variables, tokens, **options)
    return out, None
  out, sown = model.apply(variables, tokens, mutable=["losses"], **options)
  losses = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(sown)]
  return out, sum(losses, jnp.zeros(()))


def train(
    state: TrainState,
    batches: batches_lib.Batch,
    limit: Float[Array, ""] | None = None,
    *,
    task: Task,
    axis_name: str | None = None,
) -> tuple[TrainState, Float[Array, "N"]]:
  """Takes N steps.

  Args:
    state: The run so far.
    batches: Of each step, leaves [N, B, T]; with an axis, this device's part.
    limit: Updates of steps whose loss is above it, or whose gradient is not
      finite, are left out; None takes them all.
    task: The run.
    axis_name: Of the devices that hold the other parts.

  Returns:
    The new state, and each step's loss before its update: the mean over the
    tokens of the whole batch, in nats.
  """

  def step(
      state: TrainState, batch: batches_lib.Batch
  ) -> tuple[TrainState, Float[Array, ""]]:
    loss, grads = _loss_and_grads(state, batch, task, axis_name)
    params, opt_state = task.optimizer.update(
        grads, state.opt_state, state.params, state.step
    )
    new = TrainState(state.step + 1, params, opt_state)
    if limit is None:
      return new, loss
    is_good = jnp.isfinite(optax.tree.norm(grads)) & (loss <= limit)
    kept = jax.tree.map(lambda a, b: jnp.where(is_good, a, b), new, state)
    return kept._replace(step=new.step), loss

  return jax.lax.scan(step, state, batches)


def _loss_and_grads(
    state: TrainState,
    batch: batches_lib.Batch,
    task: Task,
    axis_name: str | None,
) -> tuple[Float[Array, ""], PyTree]:
  """Mean loss of a batch and its gradient, over all devices and parts."""
  # Of seed and step alone, so that a restart drops the same; 1 keeps the
  # stream apart from that of the first values.
  key = jax.random.fold_in(jax.random.key(task.config.seed), 1)
  key = jax.random.fold_in(key, state.step)
  if axis_name is not None:
    key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
  # All tokens of the step, before the parts: the mean over tokens is no mean
  # of the parts' means where they have unlike numbers.
  total = sum_over(batch.weights.sum(), axis_name)
  num_parts = task.config.grad_accum
  grad_of = jax.value_and_grad(
      lambda params, part, key: loss_sum(params, part, task, key) / total
  )
  if num_parts == 1:
    return sum_over(grad_of(state.params, batch, key), axis_name)

  # Each part has sequences of every device of a mesh.
  split = lambda leaf: leaf.reshape(-1, num_parts, leaf.shape[-1])
  parts = jax.tree.map(lambda leaf: split(leaf).swapaxes(0, 1), batch)

  def add(so_far: PyTree, part: PyTree) -> tuple[PyTree, None]:
    return jax.tree.map(jnp.add, so_far, grad_of(state.params, *part)), None

  start = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
  keys = jax.random.split(key, num_parts)
  found, _ = jax.lax.scan(add, start, (parts, keys))
  return sum_over(found, axis_name)


def sum_over(tree: PyTree, axis_name: str | None) -> PyTree:
  """Adds what devices hold up over them, where there are several."""
  return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def evaluate(
    params: PyTree,
    batches: batches_lib.Batch,
    *,
    task: Task,
    axis_name: str | None = None,
) -> Float[Array, ""]:
  """Mean loss of a text in nats, nothing dropped.

  Args:
    params: Parameters.
    batches: The text, leaves [N, B, T]; with an axis, this device's part.
    task: The run.
    axis_name: As in `train`.
  """

  def add(so_far: PyTree, batch: batches_lib.Batch) -> tuple[PyTree, None]:
    found = loss_sum(params, batch, task), batch.weights.sum()
    return jax.tree.map(jnp.add, so_far, found), None

  sums, _ = jax.lax.scan(add, (jnp.zeros(()), jnp.zeros(())), batches)
  loss, number = sum_over(sums, axis_name)
  return loss / number
