"""A search for blocks of great score that asks few of them.

A range of blocks is cut into m equal chunks. At every step each chunk is
halved, both halves are scored by the block in their middle, and the m best
stay, until a chunk is a block: 2 m log2(C / m) scores instead of C.

Letters: C blocks, m blocks that are kept.
"""

from collections.abc import Callable
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

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
