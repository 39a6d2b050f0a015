"""One run of Table 1: its initial values, its updates, what is observed of it.

A batch of B sequences of K classes, one sequence per class, holds each sequence
n_k times. Its loss is sum_k (n_k / B) loss_k, so that K sequences with weights
give the loss and the gradient of B sequences exactly (`count_classes`); what
else is saved is told in hierarchy_model.py. Step s of a seed draws the same
labels whatever the savings.

Pure functions of one member of an ensemble; scansnap_jax/ensemble.py lifts them
to many members at once.

Letters as in `joma.hierarchy`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree
import optax

from joma.hierarchy import model as hierarchy_model
from joma.hierarchy import scores as hierarchy_scores


class Latents(NamedTuple):
  """What the scores of a run need to know.

  Attributes:
    activity: For each level, the classes last: which latents a class holds.
    unseen_tokens: Sequences of unseen combinations of latents.
    unseen_activity: For each level: which latents those hold; of the classes
      none.
    unseen_weights: Of the unseen combinations, with sum 1.
  """

  activity: tuple[Bool[Any, "K _"], ...]
  unseen_tokens: Int[Any, "Q T"]
  unseen_activity: tuple[Bool[Any, "Q _"], ...]
  unseen_weights: Float[Any, "Q"]


class TableRun(NamedTuple):
  """What tells the runs of one setting apart.

  Attributes:
    seed: Seed of initial values, labels and permutations.
    lr: Learning rate.
    weight_decay: Coefficient of L2, inside Adam.
    tokens: The sequence of each class, perhaps with merged padding.
    num_padding: How many tokens the first of each sequence stands for.
    latents: `Latents`, for `observe`; None where nothing is observed.
  """

  seed: Int[Any, ""]
  lr: Float[Any, ""]
  weight_decay: Float[Any, ""]
  tokens: Int[Any, "K T"]
  num_padding: Int[Any, ""]
  latents: PyTree


class TrainState(NamedTuple):
  """What a run carries from step to step."""

  run: TableRun
  step: Int[Array, ""]
  params: PyTree
  opt_state: PyTree


class Observation(NamedTuple):
  """What is read off a run.

  Attributes:
    accuracy: Of the classes, in [0, 1].
    scores: For each level, the classes last.
  """

  accuracy: Float[Array, ""]
  scores: tuple[hierarchy_scores.Scores, ...]


def make_optimizer(
    lr: float | Float[Array, ""], weight_decay: float | Float[Array, ""]
) -> optax.GradientTransformation:
  """Adam on the gradient plus weight_decay * params (L2, not AdamW)."""
  return optax.chain(optax.add_decayed_weights(weight_decay), optax.adam(lr))


def init(
    run: TableRun,
    shared: tuple[()] = (),
    *,
    model: hierarchy_model.HierarchyTransformer,
) -> TrainState:
  """Initial parameters and optimizer state of a run, from its seed."""
  del shared  # All that runs share is the model.
  init_key, _, _ = _keys(run.seed)
  params = model.init(init_key, run.tokens[:1])["params"]
  opt_state = make_optimizer(run.lr, run.weight_decay).init(params)
  return TrainState(run, jnp.zeros((), jnp.int32), params, opt_state)


def _keys(seed: int | Int[Array, ""]) -> tuple[Array, Array, Array]:
  """Keys of the initial values, of the labels and of the permutations."""
  init_key, data_key, shuffle_key = jax.random.split(jax.random.key(seed), 3)
  return init_key, data_key, shuffle_key


def draw_labels(
    seed: int | Int[Array, ""],
    step: int | Int[Array, ""],
    num_classes: int,
    batch_size: int,
) -> Int[Array, "B"]:
  """Draws the classes of a batch: a pure function of (seed, step)."""
  _, data_key, _ = _keys(seed)
  step_key = jax.random.fold_in(data_key, step)
  return jax.random.randint(step_key, (batch_size,), 0, num_classes)


def weighted_loss(
    params: PyTree,
    model: hierarchy_model.HierarchyTransformer,
    tokens: Int[Array, "B T"],
    labels: Int[Array, "B"],
    weights: Float[Array, "B"],
    num_padding: int | Int[Array, ""] = 1,
    *,
    last_only: bool = True,
) -> Float[Array, ""]:
  """Cross-entropy of the class in nats, sum over sequences with weights."""
  logits: Any = model.apply(
      {"params": params}, tokens, num_padding, last_only=last_only
  )
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  return weights @ losses


def descend(
    state: TrainState,
    *,
    model: hierarchy_model.HierarchyTransformer,
    batch_size: int,
    num_steps: int,
    count_classes: bool = True,
    last_only: bool = True,
) -> tuple[TrainState, Float[Array, "I"]]:
  """Takes I steps of one run.

  Args:
    state: The run so far.
    model: The Transformer.
    batch_size: B.
    num_steps: I.
    count_classes: Compute each class once, weighted by how often it was drawn.
    last_only: Compute the last block at the last position alone.

  Returns:
    The new state, and the batch loss before each update.
  """
  run = state.run
  optimizer = make_optimizer(run.lr, run.weight_decay)
  num_classes = run.tokens.shape[0]

  def step(state: TrainState, _: None) -> tuple[TrainState, Float[Array, ""]]:
    labels = draw_labels(run.seed, state.step, num_classes, batch_size)
    # Labels are drawn alike with and without the saving, so that both take the
    # same steps up to rounding.
    weights = jnp.full(batch_size, 1 / batch_size)
    if count_classes:
      weights = jax.nn.one_hot(labels, num_classes).mean(axis=0)
      labels = jnp.arange(num_classes)
    tokens = run.tokens if count_classes else run.tokens[labels]
    loss, grads = jax.value_and_grad(weighted_loss)(
        state.params,
        *(model, tokens, labels, weights, run.num_padding),
        last_only=last_only,
    )
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(run, state.step + 1, params, opt_state), loss

  return jax.lax.scan(step, state, length=num_steps)


def observe(
    run: TableRun,
    params: PyTree,
    *,
    model: hierarchy_model.HierarchyTransformer,
    num_shuffles: int,
) -> Observation:
  """Reads accuracy and scores off the parameters; block s tells of level s."""
  num_classes, latents = run.tokens.shape[0], run.latents
  tokens = jnp.concatenate([run.tokens, latents.unseen_tokens])
  logits, seen = model.apply(
      {"params": params}, tokens, run.num_padding, mutable="intermediates"
  )
  sown = seen["intermediates"]
  is_right = logits[:num_classes].argmax(axis=1) == jnp.arange(num_classes)
  *_, shuffle_key = _keys(run.seed)
  scores = []
  for level, activity in enumerate(latents.activity):
    (hidden,) = sown[hierarchy_model.block_name(level)]["hidden"]
    pooled = hierarchy_scores.pool(hidden)
    found = hierarchy_scores.score(
        shuffle_key,
        *(pooled[:num_classes], activity, pooled[num_classes:]),
        *(latents.unseen_activity[level], latents.unseen_weights),
        num_shuffles=num_shuffles,
    )
    scores.append(found)
  return Observation(is_right.mean(dtype=jnp.float32), tuple(scores))


def train(
    state: TrainState,
    shared: tuple[()] = (),
    *,
    model: hierarchy_model.HierarchyTransformer,
    batch_size: int,
    num_steps: int,
    num_shuffles: int,
) -> tuple[TrainState, Float[Array, "I"], tuple[Observation, Observation]]:
  """Takes I steps of one run and observes it before and after.

  Args:
    state: The run so far.
    shared: Nothing; for `Ensemble.map`.
    model: The Transformer.
    batch_size: B.
    num_steps: I.
    num_shuffles: Permutations behind the shuffled scores.

  Returns:
    The new state, the batch loss before each update, and the observations.
  """
  del shared
  look = lambda params: observe(
      state.run, params, model=model, num_shuffles=num_shuffles
  )
  start = state.params
  state, losses = descend(
      state, model=model, batch_size=batch_size, num_steps=num_steps
  )
  # One program for both, which is the half of what there is to compile.
  both = jax.tree.map(lambda *ends: jnp.stack(ends), start, state.params)
  seen = jax.lax.map(look, both)
  before, after = (jax.tree.map(lambda x, i=i: x[i], seen) for i in (0, 1))
  return state, losses, (before, after)
