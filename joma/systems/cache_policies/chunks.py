"""Chunks of tokens that follow each other in the text.

Letters: B batch, K key and value heads, C slots.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def sums(
    score: Float[Array, "B K C"], pos: Int[Array, "B K C"], size: int
) -> Float[Array, "B K C"]:
  """For each slot the sum over those whose tokens are of the same chunk.

  Args:
    score: Of slots.
    pos: Of their tokens; empty slots, -1, are a chunk of their own.
    size: Tokens of a chunk.
  """
  num_slots = pos.shape[-1]

  def of_head(
      score: Float[Array, "C"], pos: Int[Array, "C"]
  ) -> Float[Array, "C"]:
    # Chunks are numbered in the order of the text: there are C of them at most.
    order = jnp.argsort(pos)
    chunk = jnp.where(pos < 0, -1, pos // size)[order]
    is_next = jnp.concatenate([jnp.zeros(1, bool), chunk[1:] != chunk[:-1]])
    number = jnp.cumsum(is_next)
    sums = jax.ops.segment_sum(score[order], number, num_slots)
    return jnp.zeros_like(score).at[order].set(sums[number])

  return jax.vmap(jax.vmap(of_head))(score, pos)
