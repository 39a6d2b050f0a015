"""Which slot a new token takes, and what is computed of its attention.

What has the least priority goes, first tokens and recent ones excepted. With w
the attention weights of a step, joined over query heads by `reduce`:

  sum, ema   priority = score; score <- decay score + gain w
  mean       priority = score / steps since the token came; score as above
  votes      priority = score = how many of the last `history` steps had w > 1/n
             of n tokens seen
  position   priority = position; scores stay
  key_norm   priority = score = -||key||, from when the token came

These hold H2O (https://arxiv.org/abs/2306.14048), A2SF (2407.20485), TOVA
(2401.06104: decay 0 and "layer"), SnapKV after its prompt (2404.14469: decay
1 - 1/W, gain 1/W), Scissorhands (2305.17118), StreamingLLM (2309.17453) and
Knorm (2406.11430).
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas import implementations
from kernels_pallas.decode import slots as slots_lib

Score = Literal["sum", "mean", "ema", "votes", "position", "key_norm"]
Reduce = Literal["sum", "max", "mean", "layer"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
  """What is known of a step while it is traced.

  Attributes:
    num_sinks: Tokens at positions below it are never evicted.
    num_recent: Nor so many positions before the new token's.
    score: What priority is, see above.
    decay: What a step leaves of the scores.
    gain: Factor of what a step adds to them.
    reduce: How query heads join: those of a group by "sum", "max" or "mean",
      those of the whole layer by "layer", a mean.
    history: Steps that have a vote, 1 to 32.
    scale: Factor of the logits.
    logits_soft_cap: c in c tanh(logits / c), or None.
    window: Positions that the query sees, its own included; None is all.
    config: Sizes of the implementation, None for its own choice.
  """

  num_sinks: int = 0
  num_recent: int = 0
  score: Score = "sum"
  decay: float = 1.0
  gain: float = 1.0
  reduce: Reduce = "sum"
  history: int = 32
  scale: float
  logits_soft_cap: float | None = None
  window: int | None = None
  config: implementations.Config = None

  @property
  def keeps_scores(self) -> bool:
    """Whether attention leaves the scores as they are."""
    return self.score in ("position", "key_norm")


def order(
    score: Float[Array, "*rows C"],
    pos: Int[Array, "*rows C"],
    position: Int[Array, "..."],
    rule: Rule,
) -> Float[Array, "*rows C"]:
  """What to evict first: the least, and of equal ones that of least index.

  Empty slots are -inf, protected ones inf, and so are closed ones.
  """
  priority = score
  if rule.score == "mean":
    age = jnp.maximum(position - pos, 1)
    priority = score / age.astype(score.dtype)
  elif rule.score == "position":
    priority = pos.astype(score.dtype)
  # Compared by position: slots are in no order.
  is_protected = is_protected_at(pos, position, rule)
  # In this order: an empty slot is taken before all, whatever its number would
  # be protected by, and a closed one never.
  priority = jnp.where(is_protected, jnp.inf, priority)
  priority = jnp.where(pos < 0, -jnp.inf, priority)
  return jnp.where(pos == slots_lib.CLOSED, jnp.inf, priority)


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


def entering(key: Float[Array, "*rows H"], rule: Rule) -> Float[Array, "*rows"]:
  """The score with which a token comes: 0, or minus the norm of its key."""
  if rule.score != "key_norm":
    return jnp.zeros(key.shape[:-1], jnp.float32)
  key = key.astype(jnp.float32)
  return -jnp.sqrt((key * key).sum(axis=-1))


def joined(
    weights: Float[Array, "B K G C"], rule: Rule
) -> Float[Array, "B K C"]:
  """What each slot received, of the query heads that `reduce` joins."""
  if rule.reduce == "layer":
    of_layer = weights.mean(axis=(1, 2))[:, None]
    return jnp.broadcast_to(of_layer, (*weights.shape[:2], weights.shape[3]))
  return getattr(weights, rule.reduce)(axis=2)


def rescored(
    score: Float[Array, "*shape"], mass: Float[Array, "*shape"], rule: Rule
) -> Float[Array, "*shape"]:
  """Scores after slots received `mass`; those of votes are of `count`."""
  if rule.keeps_scores:
    return score
  mass = mass.astype(score.dtype)
  # A factor of 1 would still be a multiplication where XLA does not fold it.
  return rule.decay * score + (mass if rule.gain == 1 else rule.gain * mass)


def voted(
    votes: Int[Array, "*shape"], is_above: Bool[Array, "*shape"], rule: Rule
) -> Int[Array, "*shape"]:
  """Votes with one more, in the lowest bit; the oldest is forgotten."""
  # As int32, of which every chip has shifts; -1 are all 32 bits.
  kept = -1 if rule.history == 32 else (1 << rule.history) - 1
  return ((votes << 1) | is_above.astype(jnp.int32)) & jnp.int32(kept)


def count(votes: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
  """The number of set bits, as a score.

  Sums of neighbours, of 1, 2, 4 and then 8 bits each: a TPU has no instruction
  for it.
  """
  down = jax.lax.shift_right_logical
  shifted = lambda x, by: down(x, jnp.full_like(x, by))
  x = votes - (shifted(votes, 1) & 0x55555555)
  x = (x & 0x33333333) + (shifted(x, 2) & 0x33333333)
  x = (x + shifted(x, 4)) & 0x0F0F0F0F
  # The highest byte of the product is the sum of all four.
  return shifted(x * 0x01010101, 24).astype(jnp.float32)


def updated(
    cache: slots_lib.Slots,
    weights: Float[Array, "B K G C"],
    is_seen: Bool[Array, "B K C"],
    positions: Int[Array, "B"],
    rule: Rule,
) -> slots_lib.Slots:
  """The cache with scores after a step; of inactive sequences as they were."""
  if rule.keeps_scores:
    return cache
  is_active = (positions >= 0)[:, None, None]
  # What an inactive sequence computes must leave no trace.
  mass = joined(weights, rule)
  votes = cache.votes
  if rule.score == "votes":
    # Above the mean weight of what was seen: w > 1 / n without a division.
    num_seen = is_seen.sum(axis=-1, keepdims=True)
    votes = voted(votes, mass * num_seen > 1, rule)
    score = count(votes)
    votes = jnp.where(is_active, votes, cache.votes)
  else:
    score = rescored(cache.score, mass, rule)
  score = jnp.where(is_active, score, cache.score)
  return dataclasses.replace(cache, score=score, votes=votes)
