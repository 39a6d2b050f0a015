"""Mass of blocks by the sums of antidiagonals: the search of `xattention`.

Letters: B batch, T queries, N query heads, K key and value heads, G = N / K, H
head size, C blocks, R groups of a block, M groups, W blocks that are read, J =
stride H.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas import masks


def grouped(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    size: int,
    stride: int,
) -> tuple[Float[Array, "C B K G R J"], Float[Array, "B K M J"]]:
  """Lays groups of queries, reversed, and of keys out as rows.

  Reversed in each group, the product of two rows is an antidiagonal's sum.

  Args:
    query: Rotated.
    key: Likewise.
    size: Tokens of a block.
    stride: Of a group.
  """
  (batch, length, num_kv_heads), num_blocks = (
      key.shape[:3],
      -(-key.shape[1] // size),
  )
  fill = lambda x: jnp.pad(
      jax.lax.stop_gradient(x),
      ((0, 0), (0, num_blocks * size - length), (0, 0), (0, 0)),
  )
  query, key = fill(query), fill(key)
  shape = (batch, num_blocks, size // stride, stride, num_kv_heads)
  query = query.reshape(*shape, -1, query.shape[-1])[:, :, :, ::-1]
  query = query.transpose(1, 0, 4, 5, 2, 3, 6)
  key = key.reshape(batch, -1, stride, num_kv_heads, key.shape[-1])
  key = key.transpose(0, 3, 1, 2, 4)
  return query.reshape(*query.shape[:5], -1), key.reshape(*key.shape[:3], -1)


def mass(
    query: Float[Array, "B K G R J"],
    key: Float[Array, "B K M J"],
    own: Int[Array, ""],
    scale: float,
) -> Float[Array, "B K G C"]:
  """Share of each block of keys in the mass of one block of queries."""
  groups = query.shape[3]
  logits = jnp.einsum(
      "BKGRJ,BKMJ->BKGRM", query, key, preferred_element_type=jnp.float32
  )
  row = (own * groups + jnp.arange(groups))[:, None]
  is_seen = jnp.arange(key.shape[2])[None] <= row
  logits = jnp.where(is_seen[None, None, None], logits * scale, -jnp.inf)
  found = jax.nn.softmax(logits).mean(axis=3)
  return found.reshape(*found.shape[:3], -1, groups).sum(axis=-1)


def fewest(
    mass: Float[Array, "B N C"], own: Int[Array, ""], threshold: float, k: int
) -> tuple[Int[Array, "B N W"], Bool[Array, "B N W"]]:
  """The heaviest blocks until they hold the threshold, its own first.

  Args:
    mass: Of blocks.
    own: The block of the queries, which is read always, as the first one is.
    threshold: Share of the mass; 1 takes all.
    k: Most blocks; 0 is no limit.
  """
  block = masks.to_rank(jnp.arange(mass.shape[-1]), 3)
  rank = jnp.where(block == 0, 2.0, mass)
  rank = jnp.where(block == own, 3.0, rank)
  rank = jnp.where(block <= own, rank, -jnp.inf)
  width = min(k or mass.shape[-1], mass.shape[-1])
  best, blocks = jax.lax.top_k(rank, width)
  is_valid = best > -jnp.inf
  if threshold < 1:
    held = jnp.take_along_axis(mass, blocks, axis=-1)
    before = jnp.cumsum(held, axis=-1) - held
    is_valid &= (before < threshold) | (best > 1.5)
  return blocks.astype(jnp.int32), is_valid
