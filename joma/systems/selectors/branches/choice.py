"""Which blocks a query of native sparse attention reads whole.

Letters: B batch, T queries, N query heads, K key and value heads, G = N / K, H
head size, C blocks, U keys of a block, W blocks that are read.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from joma.systems.selectors import best_blocks
from kernels_pallas import masks
from kernels_pallas import selection


def choose(
    query: Float[Array, "B T K G H"],
    keys: Float[Array, "B C K H"],
    own: Int[Array, "B T"],
    k: int,
    scale: float,
) -> tuple[Int[Array, "B T K W"], Bool[Array, "B T K W"]]:
  """Blocks by the weights of compressed keys before each query's own block."""
  scores = scale * jnp.einsum("BTKGH,BCKH->BTKGC", query, keys)
  block = jnp.arange(keys.shape[1])[None, None, None]
  own = jnp.broadcast_to(own[..., None], scores.shape[:3])
  is_before = (block < own[..., None])[:, :, :, None]
  # Where there is none before it the weights are of nothing and not looked at.
  least = jnp.finfo(scores.dtype).min
  weights = jax.nn.softmax(jnp.where(is_before, scores, least))
  return best_blocks.best(weights.sum(axis=3), own, k)


def of_text(
    query: Float[Array, "B T N H"],
    keys: Float[Array, "B C K H"],
    size: int,
    k: int,
    scale: float,
) -> selection.Selection:
  """The blocks of each query by itself, shared by a group.

  Args:
    query: Of whole texts, rotated.
    keys: Compressed, of all blocks.
    size: U.
    k: Blocks that a query reads, its own included.
    scale: Of logits.
  """
  batch, length, _, head_dim = query.shape
  num_blocks, num_kv_heads = keys.shape[1:3]
  wide = lambda x: jax.lax.stop_gradient(x).astype(jnp.float32)
  shape = (batch, num_blocks, size, num_kv_heads, -1, head_dim)
  fill = ((0, 0), (0, num_blocks * size - length), (0, 0), (0, 0))
  runs = jnp.moveaxis(jnp.pad(wide(query), fill).reshape(shape), 1, 0)

  def find(run: tuple[Array, Array]) -> tuple[Array, Array]:
    # One block of queries at a time: no array is of queries by blocks.
    number, query = run
    own = jnp.full((batch, size), number)
    return choose(query, wide(keys), own, k, scale)

  found = jax.lax.map(find, (jnp.arange(num_blocks), runs))
  # [C, B, U, K, W] to [B, K, T, W].
  join = lambda x: jnp.moveaxis(x, (1, 3), (0, 1)).reshape(
      batch, num_kv_heads, -1, x.shape[-1]
  )[:, :, :length]
  blocks, is_valid = (join(x) for x in found)
  count = is_valid.sum(axis=-1).astype(jnp.int32)
  return selection.Selection(blocks, count, masks.causal(length), 1, size)
