"""A small model that learns a task of symbols, to have one to evaluate.

Cross-entropy at the queries alone, AdamW with a warm-up and a half cosine; new
examples at every step. Multi-query recall falls into place at once, after a
plateau, when the two layers have found each other.

Letters: B examples, T tokens, S steps.
"""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree
import numpy as np
import optax

from joma.inference.evaluation import tasks
from joma.transformer import config as configs
from joma.transformer import model as models
from joma.transformer.layers import cross_entropy
from joma.transformer.training import layouts
from joma.transformer.training import lm_step
from scansnap_jax.experiment import errors

# Steps of one call on the device.
_STEPS_AT_ONCE = 25
_WARMUP_FRACTION = 0.05


def train(
    config: configs.TransformerConfig,
    draw: Callable[[np.random.Generator], tasks.Example],
    *,
    num_steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    on_progress: Callable[[int], None] = lambda num_steps: None,
) -> tuple[PyTree, Float[np.ndarray, "S"]]:
  """Trains a model.

  Args:
    config: Its shape.
    draw: Draws an example; all are of one length.
    num_steps: S.
    batch_size: B.
    lr: Highest learning rate.
    seed: Of initial values and examples.
    on_progress: Told how many steps have been taken since.

  Returns:
    (params, losses), the latter of each step before its update, in nats.

  Raises:
    UserError: Training diverged.
  """
  model = models.Transformer(config)
  generator = np.random.default_rng(seed)
  optimizer = _make_optimizer(lr, num_steps)
  example = draw(np.random.default_rng(seed))
  start = jax.jit(model.init)(
      jax.random.key(seed), jnp.asarray(example.tokens)[None]
  )
  state = (start["params"], optimizer.init(start["params"]))
  losses = []
  for first in range(0, num_steps, _STEPS_AT_ONCE):
    steps = min(_STEPS_AT_ONCE, num_steps - first)
    make = lambda: tasks.stack([draw(generator) for _ in range(batch_size)])
    drawn = [make() for _ in range(steps)]
    tokens = np.stack([batch.tokens for batch in drawn])
    targets = np.stack([batch.targets for batch in drawn])
    state, found = _advance(state, tokens, targets, model, optimizer)
    losses.append(np.asarray(found))
    _check_finite(losses[-1], first)
    on_progress(steps)
  # A loss is taken before its update: the last one shows in parameters alone.
  # Where their squares overflow, norms make nothing of all that they see.
  if not layouts.is_finite(jax.tree.map(jnp.square, state[0])).all():
    _check_finite(np.array([np.nan]), num_steps - 1)
  return state[0], np.concatenate(losses)


def _make_optimizer(lr: float, num_steps: int) -> optax.GradientTransformation:
  """AdamW with clipping, warm-up and a cosine to 0."""
  schedule = optax.warmup_cosine_decay_schedule(
      0.0, lr, max(int(_WARMUP_FRACTION * num_steps), 1), num_steps
  )
  return optax.chain(
      optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01)
  )


def _check_finite(losses: Float[np.ndarray, "S"], first: int) -> None:
  """Raises UserError at the first loss that is NaN or infinite."""
  is_good = np.isfinite(losses)
  if not is_good.all():
    raise errors.UserError(
        f"training diverged at step {first + int(np.argmin(is_good))}: use a"
        " smaller lr, in a new workdir."
    )


@functools.partial(jax.jit, static_argnums=(3, 4), donate_argnums=0)
def _advance(
    state: tuple[PyTree, optax.OptState],
    tokens: Int[Array, "S B T"],
    targets: Int[Array, "S B T"],
    model: models.Transformer,
    optimizer: optax.GradientTransformation,
) -> tuple[tuple[PyTree, optax.OptState], Float[Array, "S"]]:
  def step(
      state: tuple[PyTree, optax.OptState], batch: tuple[Array, Array]
  ) -> tuple[tuple[PyTree, optax.OptState], Array]:
    params, opt_state = state
    loss, grads = jax.value_and_grad(_loss)(params, *batch, model)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), loss

  return jax.lax.scan(step, state, (tokens, targets))


def _loss(
    params: PyTree,
    tokens: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    model: models.Transformer,
) -> Float[Array, ""]:
  logits, extra = lm_step.apply_with_losses(model, params, tokens)
  is_asked = targets >= 0
  losses = cross_entropy.token_losses(logits, jnp.maximum(targets, 0))
  loss = (losses * is_asked).sum() / jnp.maximum(is_asked.sum(), 1)
  return loss if extra is None else loss + extra
