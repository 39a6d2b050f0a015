"""A search for blocks of great score that asks few of them.

A range of blocks is cut into m equal chunks. At every step each chunk is
halved, both halves are scored by the block in their middle, and the m best
stay, until a chunk is a block: 2 m log2(C / m) scores instead of C.

Letters: B batch, T queries, S keys, N query heads, K key heads, H head size, C
blocks, R query blocks, m blocks that are kept.
"""

from collections.abc import Callable
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas import masks


def num_steps(num_blocks: int, num_kept: int) -> int:
  """Halvings until chunks of C / m blocks are blocks."""
  return math.ceil(math.log2(max(-(-num_blocks // num_kept), 1)))


def search(
    score: Callable[[Array], Array],
    first: Int[Array, "*b"],
    stop: Int[Array, "*b"],
    num_kept: int,
    num_steps: int,
) -> tuple[Int[Array, "*b m"], Bool[Array, "*b m"]]:
  """Finds blocks of great score in [first, stop).

  Args:
    score: Of blocks [*b, 2 m], as many; called once a step.
    first: First block of each query.
    stop: One past its last block.
    num_kept: m, static.
    num_steps: Static, see the function of this name.

  Returns:
    (blocks, is_valid), all valid ones different.
  """
  part = masks.to_rank(jnp.arange(num_kept), first.ndim + 1)
  first = first[..., None]
  span = jnp.maximum(stop[..., None] - first, 0)
  # Lengths differ by one at most; with fewer blocks than chunks some of these
  # are empty, and stay so.
  starts = first + span * part // num_kept
  stops = first + span * (part + 1) // num_kept
  for _ in range(num_steps):
    # Rounded up: a chunk of one block is its own first half.
    middles = (starts + stops + 1) // 2
    starts = jnp.concatenate([starts, middles], axis=-1)
    stops = jnp.concatenate([middles, stops], axis=-1)
    # An empty chunk asks some block, and its score does not count.
    centres = jnp.minimum((starts + stops) // 2, stops - 1)
    scores = score(jnp.maximum(centres, 0))
    scores = jnp.where(starts < stops, scores, -jnp.inf)
    best = jax.lax.top_k(scores, num_kept)[1]
    starts, stops = (
        jnp.take_along_axis(x, best, axis=-1) for x in (starts, stops)
    )
  return starts, starts < stops


def middle_scores(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    size: int,
    stride: int,
) -> Callable[[Array], Array]:
  """Scores blocks of a text by their middle keys, for blocks of its queries.

  A choice has no gradient: what is chosen gets its own from attention.

  Args:
    query: Rotated, T = S.
    key: Rotated.
    size: Keys, and queries, of a block.
    stride: Every so many-th query of a block is asked; it divides the size.

  Returns:
    Of blocks [B, N, R, W] the scores: the greatest of the queries' products.
  """
  (batch, length, num_heads, _), num_kv_heads = query.shape, key.shape[2]
  # Copies of the last row at the end leave the max over a block as it is.
  fill = lambda x: jnp.pad(
      jax.lax.stop_gradient(x),
      ((0, 0), (0, -length % size), (0, 0), (0, 0)),
      mode="edge",
  )
  query = fill(query)[:, stride // 2 :: stride]
  query = query.reshape(batch, -1, size // stride, num_heads, query.shape[-1])
  middles = fill(key)[:, size // 2 :: size]
  middles = jnp.repeat(middles, num_heads // num_kv_heads, axis=2)
  middles = middles.swapaxes(1, 2)  # [B, N, C, H]

  def score(index: Int[Array, "B N R W"]) -> Float[Array, "B N R W"]:
    flat = index.reshape(batch, num_heads, -1, 1)
    found = jnp.take_along_axis(middles, flat, axis=2)
    found = found.reshape(*index.shape, -1)
    # A block of queries reads what any of them wants.
    return jnp.einsum("BRTNH,BNRWH->BNRTW", query, found).max(axis=3)

  return score
