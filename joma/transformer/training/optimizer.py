"""Optimizer of language models: clipping, update rule, rates, resets.

The update rule has rate 1 and state that starts at 0; the rate of a step, a
pure function of its number, multiplies what comes out. So a reset of the
moments leaves the schedule as it is. Parameters that a config leaves out of the
update have no gradient, no moments and no decay, and stay to the last bit.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree
import optax

from joma.transformer.training import lm_config


class Optimizer(NamedTuple):
  """How parameters change.

  Attributes:
    rule: Gradient to direction, clipping included.
    config: Rates and resets.
    num_steps: Length of the run.
    steps_per_epoch: Steps of an epoch.
  """

  rule: optax.GradientTransformation
  config: lm_config.LmConfig
  num_steps: int
  steps_per_epoch: int

  def init(self, params: PyTree) -> PyTree:
    """State before the first step: zeros."""
    return self.rule.init(params)

  def update(
      self,
      grads: PyTree,
      opt_state: PyTree,
      params: PyTree,
      step: Int[Array, ""],
  ) -> tuple[PyTree, PyTree]:
    """Returns the parameters and the state after a step."""
    if self.config.reset_optimizer_every_epoch:
      # Zeros are what `init` gives. In the compiled step, for an interval may
      # have the first step of an epoch inside.
      is_kept = step % self.steps_per_epoch != 0
      opt_state = jax.tree.map(
          lambda x: jnp.where(is_kept, x, jnp.zeros_like(x)), opt_state
      )
    layers = self.config.update_layers
    # Before the rule, so that the norm that is clipped is of what is updated.
    grads = jax.tree_util.tree_map_with_path(
        lambda path, grad: (
            grad if is_updated(path, layers) else jnp.zeros_like(grad)
        ),
        grads,
    )
    # The rule knows no rate: MLPs may have one of their own.
    direction, opt_state = self.rule.update(grads, opt_state, params)
    lr = learning_rate(self.config, step, self.num_steps)
    scale = (self.config.lr_mlp or self.config.lr) / self.config.lr

    def move(path: jax.tree_util.KeyPath, value: Array, change: Array) -> Array:
      if not is_updated(path, layers):
        return value
      is_mlp = any(getattr(key, "key", None) == "mlp" for key in path)
      return value - (lr * scale if is_mlp else lr) * change

    params = jax.tree_util.tree_map_with_path(move, params, direction)
    return params, opt_state


def is_updated(path: jax.tree_util.KeyPath, layers: tuple[int, ...]) -> bool:
  """Whether a parameter is of one of the layers; all are where none is named.

  Args:
    path: In the tree of a Transformer's parameters.
    layers: From 0.
  """
  names = {getattr(key, "key", None) for key in path}
  return not layers or any(f"layers_{layer}" in names for layer in layers)


def make_optimizer(
    config: lm_config.LmConfig, num_steps: int, steps_per_epoch: int
) -> Optimizer:
  """The optimizer of a run of known length."""
  clip = (
      optax.identity()
      if config.clip_norm is None
      else optax.clip_by_global_norm(config.clip_norm)
  )
  scale_by_adam = optax.scale_by_adam(config.beta_1, config.beta_2)
  decay = (
      optax.add_decayed_weights(config.weight_decay)
      if config.weight_decay
      else optax.identity()
  )
  # Decay before the moments is in them (L2); behind, it is beside (AdamW).
  rule = {
      "sgd": (clip, decay),
      "adam": (clip, decay, scale_by_adam),
      "adamw": (clip, scale_by_adam, decay),
  }[config.optimizer]
  return Optimizer(optax.chain(*rule), config, num_steps, steps_per_epoch)


def learning_rate(
    config: lm_config.LmConfig, step: int | Int[Array, ""], num_steps: int
) -> Float[Array, ""]:
  """Rate of a step, counted from 0, of the parameters outside of MLPs.

  It is lr (step + 1) / warmup_steps at first, and then constant or a half
  cosine from lr to lr_end lr.
  """
  step = jnp.asarray(step, jnp.float32)
  rate = jnp.ones(())
  if config.schedule == "cosine":
    # The last step, not the one behind it, has lr_end.
    length = max(1, num_steps - 1 - config.warmup_steps)
    done = jnp.clip((step - config.warmup_steps) / length, 0, 1)
    rate = (
        config.lr_end + (1 - config.lr_end) * (1 + jnp.cos(jnp.pi * done)) / 2
    )
  if config.warmup_steps:
    rate = rate * jnp.minimum(1, (step + 1) / config.warmup_steps)
  return config.lr * rate
