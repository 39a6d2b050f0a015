"""Policies that go by keys and values, not (or not only) by attention weights.

See `policy` for what a policy is.

Letters: B batch, T tokens of a prompt, K key and value heads, G query heads of
each, C slots, H head size.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from joma.inference.cache import policy as policy_lib
from scansnap_jax.experiment import errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knorm(policy_lib.Policy):
  """Short keys stay: they get more attention (arXiv 2406.11430)."""

  def read_prompt(self, prompt):
    return -_norm(prompt.key).swapaxes(1, 2), None, None

  def enter(self, token, state):
    return -_norm(token.key), None, state


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyDiff(policy_lib.Policy):
  """Keys that differ from the mean direction stay (arXiv 2504.15364)."""

  def priority(self, slots, position):
    unit, is_kept = _unit(slots.key), slots.pos >= 0
    return -_cosine_to_mean(unit, is_kept)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RKV(policy_lib.Policy):
  """Attended to and not redundant (after arXiv 2505.24133).

    priority = mix attention / sum(attention) - (1 - mix) softmax(cosine)

  attention is a mean over the last queries, cosine that of a key with the mean
  direction of the kept keys: the paper's mean of pairwise cosines up to a
  factor, at linear cost and at every step.

  Attributes:
    mix: Of attention, in [0, 1].
    window: Queries that the mean remembers.
  """

  mix: float = 0.1
  window: int = 32

  def __post_init__(self):
    super().__post_init__()
    if not 0 <= self.mix <= 1:
      raise errors.UserError(f"mix={self.mix} must be in [0, 1].")
    if self.window < 1:
      raise errors.UserError(f"window={self.window} must be at least 1.")

  def read_prompt(self, prompt):
    attn_weights, rows = prompt.last_weights(self.window)
    num_rows = jnp.maximum((rows >= 0).sum(-1), 1)[:, None, None]
    return attn_weights.sum(axis=3).mean(axis=2) / num_rows, None, None

  def observe(self, slots, step):
    given = step.attn_weights.mean(axis=2)
    score = slots.score + (given - slots.score) / self.window
    return score, slots.aux, slots.state

  def priority(self, slots, position):
    is_kept = slots.pos >= 0
    attention = jnp.where(is_kept, slots.score, 0.0)
    total = attention.sum(axis=-1, keepdims=True)
    cosine = _cosine_to_mean(_unit(slots.key), is_kept)
    redundancy = jax.nn.softmax(jnp.where(is_kept, cosine, -jnp.inf))
    wanted = attention / jnp.maximum(total, 1e-30)
    return self.mix * wanted - (1 - self.mix) * redundancy


@dataclasses.dataclass(frozen=True, kw_only=True)
class LagKV(policy_lib.Policy):
  """Tokens that stand out from the chunk that follows (arXiv 2504.04704).

  After the sinks the text is cut into chunks. When a chunk is complete, the
  tokens of the one before are scored: channels are scaled by the least and
  greatest value in the later chunk, and a token's score is its rank in its
  chunk, over the chunk's length, by the deviation over channels (softmax over
  the chunk, mean of keys and values). Tokens that are not scored yet have 1.

  Attributes:
    lag_size: Tokens of a chunk, at least 2.
  """

  num_sinks: int = 4
  num_recent: int | None = 0
  lag_size: int = 128

  def __post_init__(self):
    super().__post_init__()
    if self.lag_size < 2:
      raise errors.UserError(f"lag_size={self.lag_size} must be at least 2.")

  def read_prompt(self, prompt):
    """Chunk by chunk, as the decode steps would without evictions."""
    batch, seq_len, num_kv_heads, _ = prompt.key.shape
    num_chunks = max(seq_len - self.num_sinks, 0) // self.lag_size
    pos = jnp.broadcast_to(
        prompt.positions[:, None], (batch, num_kv_heads, seq_len)
    )
    slots = policy_lib.Slots(
        prompt.key.swapaxes(1, 2),
        prompt.value.swapaxes(1, 2),
        jnp.where(pos >= 0, 1.0, 0.0),
        pos,
    )
    for chunk in range(1, num_chunks):
      last = self.num_sinks + (chunk + 1) * self.lag_size - 1
      is_complete = prompt.lengths > last
      score = self._score_chunk(slots, jnp.full(batch, last), is_complete)
      slots = dataclasses.replace(slots, score=score)
    return slots.score, None, None

  def enter(self, token, state):
    return jnp.ones(token.key.shape[:2]), None, state

  def observe(self, slots, step):
    num_after_sinks = step.position + 1 - self.num_sinks
    is_complete = (num_after_sinks % self.lag_size == 0) & (
        num_after_sinks >= 2 * self.lag_size
    )
    score = self._score_chunk(slots, step.position, is_complete)
    return score, slots.aux, slots.state

  def _score_chunk(self, slots, last, is_complete) -> Any:
    """Scores the chunk before the one that ends at `last`, [B]."""
    age = last[:, None, None] - slots.pos
    is_later = (slots.pos >= 0) & (age >= 0) & (age < self.lag_size)
    is_scored = (age >= self.lag_size) & (age < 2 * self.lag_size)
    is_scored = is_scored & (slots.pos >= self.num_sinks)
    deviation = lambda x: jax.nn.softmax(
        jnp.where(is_scored, _lag_deviation(x, is_later), -jnp.inf)
    )
    both = (deviation(slots.key) + deviation(slots.value)) / 2
    order = jnp.argsort(jnp.where(is_scored, both, jnp.inf))
    rank = jnp.argsort(order) / self.lag_size
    chosen = is_scored & is_complete[:, None, None]
    return jnp.where(chosen, rank, slots.score)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpectedAttention(policy_lib.Policy):
  """Attention that future queries will give, in closed form (2510.00636).

  Queries are taken as normal, with the mean and covariance of those so far
  before rotation, turned by the mean rotation of the positions to come:

    E exp(scale q.k) = exp(scale mean.k + scale^2 k^T cov k / 2)

  normalized over the kept keys after the sinks, averaged over the group of a
  key head, times the norm of the value. A key is judged once, when it enters.

  Attributes:
    num_future: Positions to come.
  """

  num_sinks: int = 4
  num_recent: int | None = 0
  num_future: int = 512

  def __post_init__(self):
    super().__post_init__()
    if self.num_future < 1:
      raise errors.UserError(
          f"num_future={self.num_future} must be at least 1."
      )

  def init_aux(self, batch, num_kv_heads, capacity, num_groups):
    empty = jnp.zeros((batch, num_kv_heads, capacity))
    return jnp.zeros((*empty.shape, num_groups)), empty

  def init_state(self, batch, num_kv_heads, head_dim, num_groups):
    heads = (batch, num_kv_heads, num_groups, head_dim)
    return jnp.zeros(batch), jnp.zeros(heads), jnp.zeros((*heads, head_dim))

  def read_prompt(self, prompt):
    num_kv_heads, head_dim = prompt.key.shape[2:]
    is_counted = prompt.positions >= self.num_sinks
    query = prompt.raw_query.astype(jnp.float32)
    query = query.reshape(*query.shape[:2], num_kv_heads, -1, head_dim)
    query = jnp.where(is_counted[..., None, None, None], query, 0.0)
    state = (
        is_counted.sum(axis=1).astype(jnp.float32),
        query.sum(axis=1),
        jnp.einsum("BTKGH,BTKGI->BKGHI", query, query, precision="highest"),
    )
    key = prompt.key.astype(jnp.float32)
    judge = self._judge(
        state, prompt.lengths, prompt.rotate, prompt.options.scale, head_dim
    )
    aux = judge(key).swapaxes(1, 2), _norm(prompt.value).swapaxes(1, 2)
    return jnp.zeros(aux[1].shape), aux, state

  def enter(self, token, state):
    count, total, square = state
    query = token.raw_query.astype(jnp.float32)
    is_counted = token.position >= self.num_sinks
    query = jnp.where(is_counted[:, None, None, None], query, 0.0)
    state = (
        count + is_counted,
        total + query,
        square + query[..., :, None] * query[..., None, :],
    )
    judge = self._judge(
        state, token.position + 1, token.rotate, token.scale, query.shape[-1]
    )
    expected = judge(token.key.astype(jnp.float32)[:, None])[:, 0]
    zeros = jnp.zeros(token.key.shape[:2])
    return zeros, (expected, _norm(token.value)), state

  def priority(self, slots, position):
    logits, value_norm = slots.aux
    is_judged = (slots.pos >= self.num_sinks)[..., None]
    logits = jnp.where(is_judged, logits, -jnp.inf)
    expected = jax.nn.softmax(logits, axis=2).mean(axis=-1)
    return jnp.where(is_judged[..., 0], expected * value_norm, 0.0)

  def _judge(self, state, start, rotate, scale, head_dim) -> Any:
    """Returns key [B, T, K, H] -> log of the expectation [B, T, K, G]."""
    count, total, square = state
    count = jnp.maximum(count, 1)[:, None, None, None]
    mean = total / count
    outer = mean[..., :, None] * mean[..., None, :]
    covariance = square / count[..., None] - outer
    future = start[:, None] + jnp.arange(self.num_future)[None]
    basis = jnp.broadcast_to(
        jnp.eye(head_dim)[None, None],
        (*future.shape, head_dim, head_dim),
    )
    turn = rotate(basis, future).mean(axis=1)  # [B, H, H]: rows are R e_i.
    mean = jnp.einsum("BHI,BKGH->BKGI", turn, mean, precision="highest")
    covariance = jnp.einsum(
        "BHI,BKGHJ,BJL->BKGIL", turn, covariance, turn, precision="highest"
    )

    def judge(key):
      first = jnp.einsum("BTKH,BKGH->BTKG", key, mean, precision="highest")
      second = jnp.einsum(
          "BTKH,BKGHI,BTKI->BTKG", key, covariance, key, precision="highest"
      )
      return scale * first + scale**2 * second / 2

    return judge


def _norm(x) -> Any:
  return jnp.linalg.norm(x.astype(jnp.float32), axis=-1)


def _unit(key) -> Any:
  key = key.astype(jnp.float32)
  return key / jnp.maximum(_norm(key), 1e-12)[..., None]


def _cosine_to_mean(unit, is_kept) -> Any:
  kept = jnp.where(is_kept[..., None], unit, 0.0)
  mean = kept.sum(axis=2) / jnp.maximum(is_kept.sum(axis=2), 1)[..., None]
  length = jnp.maximum(_norm(mean), 1e-12)
  cosine = jnp.einsum("BKCH,BKH->BKC", unit, mean, precision="highest")
  return cosine / length[..., None]


def _lag_deviation(x, is_later) -> Any:
  """Deviation over channels, each scaled by its range among later tokens."""
  x, later = x.astype(jnp.float32), is_later[..., None]
  least = jnp.where(later, x, jnp.inf).min(axis=2, keepdims=True)
  greatest = jnp.where(later, x, -jnp.inf).max(axis=2, keepdims=True)
  extent = jnp.where(greatest > least, greatest - least, 1.0)
  least = jnp.where(jnp.isfinite(least), least, 0.0)
  return jnp.std((x - least) / extent, axis=-1, ddof=1)
