"""One run: its initial values, its updates, and what is observed of it.

Pure functions of one member of an ensemble and of a tree that all members share
(`Shared`); ensemble.py lifts them to many members at once.

Letters as in `scansnap_jax`.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree
import optax

from scansnap_jax import config as config_lib
from scansnap_jax import data
from scansnap_jax import metrics
from scansnap_jax import model


class SweepRun(NamedTuple):
  """What tells the runs of one data setting apart.

  Attributes:
    seed: Seed of data and initial values.
    stream: Position of the seed among the seeds of the sweep.
    lr_z: eta_Z.
    lr_ratio: eta_Y / eta_Z.
  """

  seed: Int[Any, "*r"]
  stream: Int[Any, "*r"]
  lr_z: Float[Any, "*r"]
  lr_ratio: Float[Any, "*r"]


class Shared(NamedTuple):
  """The sequence classes as arrays; see data.SequenceClasses."""

  probs: Float[Array, "K M"]
  support: Int[Array, "K L"]
  query: Int[Array, "K"]
  label: Int[Array, "K"]
  is_distinct: Bool[Array, "K M"]
  is_common: Bool[Array, "K M"]
  class_probs: Float[Array, "K"]


class TrainState(NamedTuple):
  """What a run carries from step to step."""

  run: SweepRun
  params: PyTree
  opt_state: PyTree


class Observation(NamedTuple):
  """What is read off the attention of a run; see metrics.py.

  Attributes:
    distinct_entropy: Nats.
    common_mass: In [0, 1].
    population_loss: Cross-entropy of the next token over P(n) and contexts of
      infinite length, in nats.
    attended: c_n.
  """

  distinct_entropy: Float[Array, "*r"]
  common_mass: Float[Array, "*r"]
  population_loss: Float[Array, "*r"]
  attended: Float[Array, "*r K M"]


def init(
    run: SweepRun,
    shared: Shared,
    *,
    model_config: config_lib.ModelConfig,
    optimizer_config: config_lib.OptimizerConfig,
) -> TrainState:
  """Initial parameters and optimizer state of a run, from its seed."""
  # The seed alone decides: all learning rates of a seed start alike.
  init_key, _ = jax.random.split(jax.random.key(run.seed))
  num_tokens = shared.probs.shape[1]
  layer = model.make_layer(model_config, num_tokens)
  params = layer.init(init_key, jnp.ones((1, num_tokens)), jnp.zeros(1, int))
  params = params["params"]
  opt_state = make_optimizer(optimizer_config, run).init(params)
  return TrainState(run, params, opt_state)


def draw(
    pairs: tuple[Int[Array, "N"], Int[Array, "N"]],
    shared: tuple[Float[Array, "K L"], Float[Array, "K"]],
    *,
    batch_size: int,
    seq_len: int | None,
) -> data.Batch:
  """Draws N batches, each a pure function of (seed, step).

  Args:
    pairs: The seeds of the runs, and the steps.
    shared: P(l|n) over the tokens of each class, and cumulated P(n).
    batch_size: B.
    seq_len: T, or None for infinity.

  Returns:
    The batches, leaves [N, B, ...].
  """

  def draw_one(seed: Int[Array, ""], step: Int[Array, ""]) -> data.Batch:
    _, data_key = jax.random.split(jax.random.key(seed))
    return data.sample_batch(
        # Folded in, not split off one after the other: a restart at any step
        # draws what the step would have drawn.
        jax.random.fold_in(data_key, step),
        *shared,
        batch_size=batch_size,
        seq_len=seq_len,
    )

  return jax.vmap(draw_one)(*pairs)


def train(
    state: TrainState,
    shared: tuple[Shared, data.Batch],
    *,
    model_config: config_lib.ModelConfig,
    optimizer_config: config_lib.OptimizerConfig,
) -> tuple[TrainState, Float[Array, "N"], tuple[Observation, Observation]]:
  """Takes N steps of one run.

  Args:
    state: The run so far.
    shared: The classes, and the batches of all seeds, [seeds, N, B, ...].
    model_config: The layer.
    optimizer_config: The optimizer.

  Returns:
    The new state, the batch loss before each update, and what is observed
    before the first one and after the last one.
  """
  classes, batches = shared
  layer = model.make_layer(model_config, classes.probs.shape[1])
  optimizer = make_optimizer(optimizer_config, state.run)

  def step(
      state: TrainState, batch: data.Batch
  ) -> tuple[TrainState, Float[Array, ""]]:
    loss, grads = jax.value_and_grad(mean_loss)(
        state.params, layer, classes, batch
    )
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.run, params, opt_state), loss

  # Batches are drawn once a seed and shared by its learning rates.
  own_batches = jax.tree.map(lambda leaf: leaf[state.run.stream], batches)
  before = observe(state.params, layer, classes)
  state, losses = jax.lax.scan(step, state, own_batches)
  return state, losses, (before, observe(state.params, layer, classes))


def mean_loss(
    params: PyTree, layer: nn.Module, classes: Shared, batch: data.Batch
) -> Float[Array, ""]:
  """Cross-entropy of the next token, in nats, mean over the batch."""
  tokens = data.to_token_counts(
      batch,
      classes.support,
      classes.query,
      classes.label,
      num_tokens=classes.probs.shape[1],
  )
  logits: Any = layer.apply({"params": params}, tokens.counts, tokens.query)
  return optax.softmax_cross_entropy_with_integer_labels(
      logits, tokens.label
  ).mean()


def population_loss(
    params: PyTree, layer: nn.Module, classes: Shared
) -> Float[Array, ""]:
  """Cross-entropy of the next token as T goes to infinity, mean over P(n)."""
  logits: Any = layer.apply({"params": params}, classes.probs, classes.query)
  losses = optax.softmax_cross_entropy_with_integer_labels(
      logits, classes.label
  )
  return (losses * classes.class_probs).sum()


def observe(params: PyTree, layer: nn.Module, classes: Shared) -> Observation:
  """Reads c_n, its summaries and the loss off the parameters."""
  attn_logits = model.reparametrize(params)["Z"]
  attended = metrics.attended_distribution(
      attn_logits, classes.probs, classes.query
  )
  return Observation(
      distinct_entropy=metrics.distinct_entropy(attended, classes.is_distinct),
      common_mass=metrics.common_mass(attended, classes.is_common),
      population_loss=population_loss(params, layer, classes),
      attended=attended,
  )


def make_optimizer(
    config: config_lib.OptimizerConfig, run: SweepRun
) -> optax.GradientTransformation:
  """One optimizer with two rates: eta_Y for the decoder, eta_Z for attention.

  In the original parametrization W_Q and W_K learn at eta_Z, U and W_V at
  eta_Y. Rates may be traced, so that one program serves a whole sweep.
  """

  def with_rate(
      learning_rate: Float[Array, ""],
  ) -> optax.GradientTransformation:
    if config.name == "adam":
      return optax.adam(learning_rate)
    momentum = config.momentum if config.name == "momentum" else None
    return optax.sgd(learning_rate, momentum)

  # eta_Y = ratio eta_Z. Labels are by name, so that both parametrizations have
  # the two rates of the theory.
  return optax.partition(
      {"Y": with_rate(run.lr_z * run.lr_ratio), "Z": with_rate(run.lr_z)},
      lambda params: {
          name: "Z" if name in ("Z", "W_Q", "W_K") else "Y" for name in params
      },
  )
