"""Which blocks to compute, from a score a block: the most, or those above.

Scores may be summed activations of a predictor, one a block; Deja Vu
(https://arxiv.org/abs/2310.17157) chooses neurons so, here it is blocks.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def top_blocks(
    scores: Float[Array, "*B blocks"], num_blocks: int
) -> tuple[Int[Array, "*B S"], Int[Array, "*B"]]:
  """The blocks of highest scores; of equal ones those of lower numbers.

  Args:
    scores: [blocks] for all sequences, or [B, blocks]. -inf is never chosen.
    num_blocks: S, at least 1 and at most what there are.

  Returns:
    block_ids, int32, the chosen ones ascending and the rest after them, and
    num_valid, int32: S less the chosen of -inf.

  Raises:
    ValueError: If `num_blocks` is out of range.
  """
  _check_width("num_blocks", num_blocks, scores)
  return _list(scores, scores > -jnp.inf, num_blocks)


def threshold_blocks(
    scores: Float[Array, "*B blocks"],
    threshold: Float[Array, ""] | float,
    max_blocks: int,
) -> tuple[Int[Array, "*B S"], Int[Array, "*B"]]:
  """The blocks whose scores exceed a threshold, the highest `max_blocks`.

  Args:
    scores: [blocks] for all sequences, or [B, blocks].
    threshold: A number; it may be traced.
    max_blocks: S, the width of the list, at least 1 and at most what there are.

  Returns:
    As `top_blocks`; num_valid is how many exceed, at most S.

  Raises:
    ValueError: If `max_blocks` is out of range.
  """
  _check_width("max_blocks", max_blocks, scores)
  return _list(scores, scores > threshold, max_blocks)


def _check_width(
    name: str, width: int, scores: Float[Array, "*B blocks"]
) -> None:
  """Raises ValueError unless there are so many blocks."""
  there_are = scores.shape[-1]
  if not 1 <= width <= there_are:
    raise ValueError(
        f"{name}={width} must be from 1 to the {there_are} blocks that have"
        " scores"
    )


def _list(
    scores: jax.Array, may_be: jax.Array, width: int
) -> tuple[jax.Array, jax.Array]:
  """Of the blocks that may be chosen the `width` best, ascending."""
  # Stable: of equal scores the lower block comes first.
  order = jnp.argsort(-jnp.where(may_be, scores, -jnp.inf), axis=-1)
  # Ranks, not a threshold, so that equal scores do not exceed the width.
  rank = jnp.argsort(order, axis=-1)
  chosen = may_be & (rank < width)
  block_ids = jnp.argsort(~chosen, axis=-1, stable=True)[..., :width]
  return block_ids.astype(jnp.int32), chosen.sum(axis=-1).astype(jnp.int32)
