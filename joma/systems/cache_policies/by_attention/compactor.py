"""Keys that stand out, and keys that their chunk looks at.

Letters: B batch, T tokens of a prompt, N query heads, K key and value heads, G
query heads of each, H head size, R numbers of a sketch, M chunks of S tokens.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from joma.inference.cache import policy as policy_lib
from joma.inference.cache import rules
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require

# What makes the products of channels invertible.
_RIDGE = 1e-2
_LEAST = 1e-6
_EXACT = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compactor(policy_lib.Policy):
  """Leverage scores and non-causal attention, blended (arXiv 2507.08143).

  Of a prompt without its sinks and last tokens:

    leverage   x (X^T X + ridge)^-1 x^T of a key before rotation, less the mean
               key, times `sketch_size` directions of a normal distribution
    attention  what the queries of a key's own chunk of `chunk_size` tokens give
               it, later ones and earlier ones alike; mean over the query heads,
               times the value's norm, mean over three neighbours

  Both are brought to mean 0 and deviation 1 over the heads and tokens of a
  text; the score is `blending` leverage + attention. The paper stops at the
  prompt: a token that comes later has the leverage of its key among the
  prompt's, and the mean of attention.

  Paper's settings: 8 first and 4 last tokens stay, chunks of 256, a sketch of
  48.

  Attributes:
    chunk_size: S.
    sketch_size: R; None is every channel as it is.
    blending: None is the share of the text that leaves.
    is_scaled: Whether attention logits have the model's scale.
    seed: Of the directions.
    num_slots: C; set by `with_capacity`.
  """

  label: ClassVar[str] = "Compactor"
  uses_queries: ClassVar[bool] = True
  draws: ClassVar[bool] = True
  ranks_heads_alone: ClassVar[bool] = False
  num_sinks: int = 8
  num_recent: int | None = 4
  chunk_size: int = 256
  sketch_size: int | None = 48
  blending: float | None = None
  is_scaled: bool = True
  seed: int = 0
  num_slots: int = 0

  def __post_init__(self):
    super().__post_init__()
    for name in ("chunk_size", "sketch_size"):
      size = getattr(self, name)
      if size is not None:
        require.at_least(name, size, 1)
    if self.blending is not None and not self.blending >= 0:
      raise errors.UserError(f"blending={self.blending} must be at least 0.")

  def sized(self, capacity: int) -> policy_lib.Policy:
    """Knows how many slots there are."""
    num_recent = self.recent(capacity)
    if self.num_sinks + num_recent > capacity - 1:
      raise errors.UserError(
          f"num_sinks={self.num_sinks} and num_recent={num_recent} of compactor"
          f" must leave one of {capacity} slots."
      )
    return dataclasses.replace(self, num_recent=num_recent, num_slots=capacity)

  def init_state(
      self, batch: int, num_kv_heads: int, head_dim: int, num_groups: int
  ) -> rules.Arrays:
    """Mean key, inverse products, and mean and deviation times the blending."""
    del num_groups
    size = self.sketch_size or head_dim
    return (
        jnp.zeros((batch, num_kv_heads, head_dim)),
        jnp.zeros((batch, num_kv_heads, size, size)),
        jnp.zeros((batch, 3)),
    )

  def read_prompt(self, prompt: policy_lib.Prompt) -> rules.Prompted:
    positions, lengths = prompt.positions, prompt.lengths
    last = lengths - (self.num_recent or 0)
    counts = (positions >= self.num_sinks) & (positions < last[:, None])
    leverage, mean, inverse = self._leverage(prompt, counts)
    center, spread = _moments(leverage, counts)
    found = self._attention(prompt, counts)
    center_of, spread_of = _moments(found, counts)
    # Beside a prompt of sinks and last tokens alone no key stands out.
    share = jnp.where(counts.any(axis=-1), self._blending(lengths), 0.0)
    wide = lambda x: x[:, None, None]
    score = wide(share) * (leverage - wide(center)) / wide(spread)
    score = score + (found - wide(center_of)) / wide(spread_of)
    score = jnp.where(counts[:, None], score, 0.0)
    moments = jnp.stack([center, spread, share], axis=-1)
    return score, None, (mean, inverse, moments)

  def enter(
      self, token: policy_lib.Token, state: rules.Arrays
  ) -> rules.Entered:
    assert isinstance(state, tuple)  # As `init_state` makes it.
    mean, inverse, moments = state
    key = token.raw_key.astype(jnp.float32) - mean
    sketched = self._sketched(key[:, :, None], token.layer)
    leverage = _of_rows(sketched, inverse)[:, :, 0]
    center, spread, share = (moments[:, i, None] for i in range(3))
    score = share * (leverage - center) / jnp.maximum(spread, _LEAST)
    return score, None, state

  def _blending(self, lengths: Int[Array, "B"]) -> Float[Array, "B"]:
    if self.blending is not None:
      return jnp.full(lengths.shape, self.blending, jnp.float32)
    kept = self.num_slots / jnp.maximum(lengths, 1)
    return jnp.maximum(1 - kept, 0).astype(jnp.float32)

  def _leverage(
      self, prompt: policy_lib.Prompt, counts: Bool[Array, "B T"]
  ) -> tuple[
      Float[Array, "B K T"], Float[Array, "B K H"], Float[Array, "B K R R"]
  ]:
    """Scores, the mean key, and the inverse of products of what counts."""
    key = prompt.raw_key.swapaxes(1, 2).astype(jnp.float32)
    of = counts[:, None, :, None]
    total = jnp.maximum(of.sum(axis=2), 1)
    mean = jnp.where(of, key, 0).sum(axis=2) / total
    rows = self._sketched(
        jnp.where(of, key - mean[:, :, None], 0), prompt.layer
    )
    products = jnp.einsum("BKTR,BKTS->BKRS", rows, rows, precision=_EXACT)
    identity = jnp.eye(rows.shape[-1])
    root = jnp.linalg.cholesky(products + _RIDGE * identity[None, None])
    wide = jnp.broadcast_to(identity, root.shape)
    inverse = jax.scipy.linalg.cho_solve((root, True), wide)
    return _of_rows(rows, inverse), mean, inverse

  def _sketched(
      self, x: Float[Array, "B K n H"], layer: int
  ) -> Float[Array, "B K n R"]:
    if self.sketch_size is None:
      return x
    phi = directions(self, layer, x.shape[1], x.shape[-1])
    return jnp.einsum("BKnH,KHR->BKnR", x, phi, precision=_EXACT)

  def _attention(
      self, prompt: policy_lib.Prompt, counts: Bool[Array, "B T"]
  ) -> Float[Array, "B K T"]:
    """What keys get within their chunks, times the values' norms, smoothed."""
    num_heads, num_kv_heads = prompt.query.shape[2], prompt.key.shape[2]
    query, key, of = (
        _chunks(x, self.num_sinks, self.chunk_size)
        for x in (prompt.query, prompt.rotated_key, counts)
    )
    query = query.reshape(
        *query.shape[:3], num_kv_heads, num_heads // num_kv_heads, -1
    )
    logits = jnp.einsum(
        "BMSKGH,BMTKH->BMKGST",
        query.astype(jnp.float32),
        key.astype(jnp.float32),
        precision=_EXACT,
    )
    logits = (prompt.options.scale if self.is_scaled else 1.0) * logits
    of_key, of_query = of[:, :, None, None, None], of[:, :, None, None, :, None]
    logits = jnp.where(of_key, logits, -jnp.inf)
    highest = jnp.max(logits, axis=-1, keepdims=True, initial=-1e30)
    weights = jnp.exp(logits - highest)
    weights /= jnp.maximum(weights.sum(axis=-1, keepdims=True), 1e-30)
    given = jnp.where(of_query, weights, 0).sum(axis=4).mean(axis=3)
    seq_len = counts.shape[1]
    given = given.swapaxes(1, 2).reshape(len(counts), num_kv_heads, -1)
    given = jnp.pad(given, ((0, 0), (0, 0), (self.num_sinks, 0)))
    norm = jnp.linalg.norm(prompt.value.astype(jnp.float32), axis=-1)
    score = given[..., :seq_len] * norm.swapaxes(1, 2)
    score = jnp.where(counts[:, None], score, 0)
    padded = jnp.pad(score, ((0, 0), (0, 0), (1, 1)))
    return (padded[..., :-2] + score + padded[..., 2:]) / 3


def directions(
    policy: Compactor, layer: int, num_kv_heads: int, head_dim: int
) -> Float[Array, "K H R"]:
  """Returns what a layer's keys are multiplied with, alike for all texts."""
  size = policy.sketch_size or head_dim
  drawn = jax.random.normal(
      policy_lib.random_key(policy.seed, layer, 0),
      (num_kv_heads, head_dim, size),
  )
  return drawn / math.sqrt(size)


def _of_rows(
    rows: Float[Array, "B K n R"], inverse: Float[Array, "B K R R"]
) -> Float[Array, "B K n"]:
  solved = jnp.einsum("BKnR,BKRS->BKnS", rows, inverse, precision=_EXACT)
  return jnp.maximum((solved * rows).sum(axis=-1), 0)


def _moments(
    x: Float[Array, "B K T"], counts: Bool[Array, "B T"]
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
  """Mean and deviation over the heads and tokens of a text that count."""
  num_heads, of = x.shape[1], counts[:, None]
  total = num_heads * counts.sum(axis=-1)
  center = jnp.where(of, x, 0).sum(axis=(1, 2)) / jnp.maximum(total, 1)
  squares = jnp.where(of, (x - center[:, None, None]) ** 2, 0).sum(axis=(1, 2))
  spread = jnp.sqrt(squares / jnp.maximum(total - 1, 1))
  return center, jnp.maximum(spread, _LEAST)


def _chunks(x: Array, first: int, size: int) -> Array:
  """Tokens from `first` on in chunks: [B, M, S, ...] of [B, T, ...]."""
  x = x[:, first:]
  missing = -x.shape[1] % size if x.shape[1] else size
  x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
  return x.reshape(x.shape[0], -1, size, *x.shape[2:])
