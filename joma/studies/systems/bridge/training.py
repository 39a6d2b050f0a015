"""Trains the layer of a rung, and a twin that follows the flow of z.

The twin is a second Z, free and driven by plain gradients on samples of its
own, under the decoder, residual and MLP that the layer has at that step: the
theory integrated along training, of which its velocity at 0 is one step.

Letters: B samples of a step, C tokens of a context, E contexts that are
measured, M tokens, Q queries, R records, S steps.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import optax

from joma.studies.systems.bridge import layer

# Rate of attention over that of all else, as Scan & Snap's theorems have it.
ATTENTION_RATE = 0.1
_ATTENTION = ("attn_logits", "query_key")


class Batches(NamedTuple):
  """Samples of all steps."""

  context: Int[Array, "*b B C"]
  query: Int[Array, "*b B"]
  label: Int[Array, "*b B"]


class Probe(NamedTuple):
  """Contexts that are measured, and the queries that ask each of them."""

  context: Int[Array, "E C"]
  queries: Int[Array, "E Q"]


class Setting(NamedTuple):
  """What is static of a rung.

  Attributes:
    num_tokens: M.
    embeddings: Of `layer.EMBEDDINGS`.
    has_residual: The query itself reaches the output.
    has_mlp: There is an MLP.
    optimizer: sgd, momentum, adam or sign.
    rate: Of all but attention.
    num_held: Steps for which attention is held still.
  """

  num_tokens: int
  embeddings: str
  has_residual: bool
  has_mlp: bool
  optimizer: str
  rate: float
  num_held: int = 0


class Record(NamedTuple):
  """Of a record.

  Attributes:
    loss: Mean over its steps.
    mass: Attention on the places of the contexts that are measured.
    flow: The same of the twin.
  """

  loss: Float[Array, "*r"]
  mass: Float[Array, "*r E C"]
  flow: Float[Array, "*r E C"]


@functools.partial(jax.jit, static_argnums=0)
def train(
    setting: Setting,
    seed: Int[Array, ""],
    batches: Batches,
    twins: Batches,
    probe: Probe,
) -> Record:
  """Trains from a seed.

  Args:
    setting: Of the rung.
    seed: Of the embeddings.
    batches: [R, S / R, B, ...].
    twins: Samples of the twin's steps, likewise.
    probe: What is measured at each record.
  """
  params = layer.init(
      jax.random.key(seed),
      setting.num_tokens,
      embeddings=setting.embeddings,
      has_residual=setting.has_residual,
      has_mlp=setting.has_mlp,
  )
  rule = _rule(setting.optimizer)
  twin = jnp.zeros((setting.num_tokens,) * 2)
  step = functools.partial(_step, setting, rule)

  def record(state: Any, some: tuple[Batches, Batches]) -> tuple[Any, Record]:
    state, losses = jax.lax.scan(step, state, some)
    params, _, twin, _ = state
    return state, Record(
        losses.mean(),
        layer.mass(layer.attn_logits(params), *probe),
        layer.mass(twin, *probe),
    )

  state = (params, rule.init(params), twin, jnp.int32(0))
  return jax.lax.scan(record, state, (batches, twins))[1]


def loss_of(
    params: layer.Params,
    attn_logits: Float[Array, "M M"],
    batch: Batches,
    has_residual: bool,
) -> Float[Array, ""]:
  """Cross-entropy of a batch under a given Z."""
  logits = layer.predict(
      params, attn_logits, *batch[:2], has_residual=has_residual
  )
  return layer.mean_loss(logits, batch.label)


def _step(
    setting: Setting,
    rule: optax.GradientTransformation,
    state: Any,
    both: tuple[Batches, Batches],
) -> tuple[Any, Array]:
  params, moments, twin, number = state
  batch, other = both
  own = lambda params: loss_of(
      params, layer.attn_logits(params), batch, setting.has_residual
  )
  loss, slope = jax.value_and_grad(own)(params)
  pull = jax.grad(loss_of, argnums=1)(params, twin, other, setting.has_residual)
  direction, moments = rule.update(slope, moments, params)
  is_free = number >= setting.num_held
  rates = {name: rate_of(setting, name, is_free) for name in params}
  params = jax.tree.map(
      lambda value, rate, change: value - rate * change,
      params,
      rates,
      direction,
  )
  twin -= is_free * ATTENTION_RATE * setting.rate * pull
  return (params, moments, twin, number + 1), loss


def rate_of(setting: Setting, name: str, is_free: Array) -> Array | float:
  """Rate of a matrix, by whether attention is free to move."""
  if setting.embeddings == "frozen" and name.endswith("embedding"):
    return 0.0
  share = ATTENTION_RATE * is_free if name in _ATTENTION else 1.0
  return share * setting.rate


def _rule(name: str) -> optax.GradientTransformation:
  """Directions of a step, before its rate."""
  if name == "sign":
    return optax.scale_by_sign()
  if name == "momentum":
    return optax.trace(decay=0.9)
  if name == "adam":
    return optax.scale_by_adam()
  return optax.identity()
