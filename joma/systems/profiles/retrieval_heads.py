"""Finds the heads that need all keys, for caches that give others a window.

Gates between all keys and a stream of the newest (`duo_gates`) are trained
alone, by Adam, on texts whose answers stand far behind what they ask for:

  loss = mean over answers of ||h - h_full||^2 / D + penalty mean |alpha|

with h what the last layer leaves in the residual stream. A head whose alpha
stays high retrieves (DuoAttention, https://arxiv.org/abs/2410.10819).

Letters: B texts, T tokens, D width, L layers, K key heads.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree
import optax

from joma.transformer import model as models
from scansnap_jax.experiment import require

_SYSTEM = "duo_gates"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """How gates are trained.

  Attributes:
    sinks: First keys that every head keeps.
    recent: Newest keys that every head keeps.
    lr: Of Adam.
    num_steps: Steps, all on the same texts.
  """

  sinks: int = 4
  recent: int = 256
  lr: float = 0.02
  num_steps: int = 200

  def __post_init__(self):
    require.at_least("num_steps", self.num_steps, 1)
    require.positive("lr", self.lr)


def gates(
    model: models.Transformer,
    params: PyTree,
    tokens: Int[Array, "B T"],
    is_answer: Float[Array, "B T"],
    settings: Settings,
    penalty: float = 0.05,
) -> Float[Array, "L K"]:
  """Trains the gates of a model without systems.

  Args:
    model: The Transformer.
    params: Its parameters, which stay as they are.
    tokens: Texts.
    is_answer: 1 where the text answers; elsewhere 0.
    settings: How.
    penalty: Factor of the gates' size; the paper's.

  Returns:
    Alpha of each layer and key head, in [0, 1].
  """
  weight = jnp.asarray(penalty)
  return _train(model, settings, params, tokens, is_answer, weight)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _train(
    model: models.Transformer,
    settings: Settings,
    params: PyTree,
    tokens: Int[Array, "B T"],
    is_answer: Float[Array, "B T"],
    penalty: Float[Array, ""],
) -> Float[Array, "L K"]:
  entry = f"{_SYSTEM}:sinks={settings.sinks}:recent={settings.recent}"
  config = model.config
  gated = model.clone(config=dataclasses.replace(config, attention=(entry,)))
  want = _last(model, params, tokens)
  optimizer = optax.adam(settings.lr)

  def loss(alpha: Float[Array, "L K"]) -> Float[Array, ""]:
    error = _last(gated, _with(params, alpha), tokens) - want
    far = jnp.square(error.astype(jnp.float32)).mean(axis=-1)
    far = (far * is_answer).sum() / jnp.maximum(is_answer.sum(), 1)
    return far + penalty * jnp.abs(alpha).mean()

  def step(state: tuple[Array, Any], _: None) -> tuple[tuple[Array, Any], None]:
    alpha, moments = state
    update, moments = optimizer.update(jax.grad(loss)(alpha), moments)
    new: Any = optax.apply_updates(alpha, update)
    return (jnp.clip(new, 0, 1), moments), None

  alpha = jnp.ones((config.num_layers, config.num_kv_heads))
  start = (alpha, optimizer.init(alpha))
  return jax.lax.scan(step, start, length=settings.num_steps)[0][0]


def above(
    alpha: Float[Array, "L K"], threshold: float = 0.5
) -> tuple[tuple[int, ...], ...]:
  """Heads of each layer whose gate is above a threshold, as caches want."""
  return tuple(
      tuple(head for head, gate in enumerate(row) if gate > threshold)
      for row in alpha.tolist()
  )


def _last(
    model: models.Transformer, params: PyTree, tokens: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
  """What the last layer leaves in the residual stream."""
  found: Any = model.apply({"params": params}, tokens, mutable="intermediates")
  last = f"layers_{model.config.num_layers - 1}"
  return found[1]["intermediates"][last]["resid_mlp"][0]


def _with(params: PyTree, alpha: Float[Array, "L K"]) -> PyTree:
  """Parameters with the gates of each layer."""
  changed = dict(params)
  for layer, row in enumerate(alpha):
    name = f"layers_{layer}"
    attn = {**params[name]["attn"], _SYSTEM: {"alpha": row}}
    changed[name] = {**params[name], "attn": attn}
  return changed
