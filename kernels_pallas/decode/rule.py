"""Which slot a new token takes, and what is computed of its attention.

Heavy hitters (H2O, https://arxiv.org/abs/2306.14048): what has received least
attention goes, first tokens and recent ones excepted.
"""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
  """What is known of a step while it is traced.

  Attributes:
    num_sinks: Tokens at positions below it are never evicted.
    num_recent: Nor so many positions before the new token's.
    score: "sum" and "ema" evict what has the least score, "mean" what has the
      least score for each step since its token came.
    decay: What a step leaves of the scores.
    reduce: How the query heads of a group join in the score.
    scale: Factor of the logits.
    logits_soft_cap: c in c tanh(logits / c), or None.
    window: Positions that the query sees, its own included; None is all.
    config: Sizes of the implementation, None for its own choice.
  """

  num_sinks: int = 0
  num_recent: int = 0
  score: Literal["sum", "mean", "ema"] = "sum"
  decay: float = 1.0
  reduce: Literal["sum", "max"] = "sum"
  scale: float
  logits_soft_cap: float | None = None
  window: int | None = None
  config: Any = None


def order(
    score: Float[Array, "*rows C"],
    pos: Int[Array, "*rows C"],
    position: Int[Array, "..."],
    rule: Rule,
) -> Float[Array, "*rows C"]:
  """What to evict first: the least, and of equal ones that of least index.

  Empty slots are -inf, protected ones inf.
  """
  priority = score
  if rule.score == "mean":
    age = jnp.maximum(position - pos, 1)
    priority = score / age.astype(score.dtype)
  is_protected = is_protected_at(pos, position, rule)
  priority = jnp.where(is_protected, jnp.inf, priority)
  return jnp.where(pos < 0, -jnp.inf, priority)


def is_protected_at(
    pos: Int[Array, "*rows C"], position: Int[Array, "..."], rule: Rule
) -> Bool[Array, "*rows C"]:
  """Whether a token may not be evicted."""
  return (pos < rule.num_sinks) | (pos >= position - rule.num_recent)


def choose(
    score: Float[Array, "B K C"],
    pos: Int[Array, "B K C"],
    positions: Int[Array, "B"],
    rule: Rule,
) -> Int[Array, "B K"]:
  """The slot of each new token; -1 where the sequence is inactive."""
  slot = first_least(order(score, pos, positions[:, None, None], rule))
  return jnp.where(positions[:, None] < 0, -1, slot).astype(jnp.int32)


def first_least(order: Float[Array, "*rows C"]) -> Int[Array, "*rows"]:
  """`jnp.argmin` over the last axis, as two reductions.

  XLA's CPU takes three times as long for one of pairs.
  """
  index = jnp.arange(order.shape[-1], dtype=jnp.int32)
  is_least = order == order.min(axis=-1, keepdims=True)
  return jnp.where(is_least, index, order.shape[-1] - 1).min(axis=-1)


def sees(
    pos: Int[Array, "*rows C"], position: Int[Array, "..."], rule: Rule
) -> Bool[Array, "*rows C"]:
  """Which slots the query attends to."""
  is_seen = pos >= 0
  if rule.window is not None:
    is_seen &= pos > position - rule.window
  return is_seen


def capped(logits: Float[Array, "*shape"], rule: Rule) -> Array:
  """The soft cap."""
  if rule.logits_soft_cap is None:
    return logits
  return rule.logits_soft_cap * jnp.tanh(logits / rule.logits_soft_cap)


def updated(
    score: Float[Array, "B K C"],
    weights: Float[Array, "B K G C"],
    positions: Int[Array, "B"],
    rule: Rule,
) -> Float[Array, "B K C"]:
  """Scores after a step; of inactive sequences as they were."""
  mass = getattr(weights, rule.reduce)(axis=2)
  is_active = (positions >= 0)[:, None, None]
  new = rule.decay * score + mass.astype(score.dtype)
  return jnp.where(is_active, new, score)
