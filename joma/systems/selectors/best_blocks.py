"""Each query's own block of keys, and the best of those before it.

Letters: B batch, T queries or new keys, N query heads, K key and value heads, G
= N / K, H head size, C blocks, W blocks that are read.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from joma.transformer import config as configs
from kernels_pallas import masks
from kernels_pallas import selection


def best(
    scores: Float[Array, "*b C"], own: Int[Array, "*b"], k: int
) -> tuple[Int[Array, "*b W"], Bool[Array, "*b W"]]:
  """Returns a query's own block and the k - 1 best before it, its own first."""
  num_blocks = scores.shape[-1]
  block = masks.to_rank(jnp.arange(num_blocks), scores.ndim)
  own = own[..., None]
  scores = jnp.where(block < own, scores, -jnp.inf)
  scores = jnp.where(block == own, jnp.inf, scores)
  greatest, blocks = jax.lax.top_k(scores, min(k, num_blocks))
  return blocks.astype(jnp.int32), greatest > -jnp.inf


def best_of_query(
    query: Float[Array, "B K G H"],
    spokesmen: Float[Array, "B K C H"],
    position: Int[Array, "B"],
    size: int,
    k: int,
) -> tuple[Int[Array, "B K W"], Bool[Array, "B K W"]]:
  """As `best`, of one query a sequence; its heads of a group sum their scores.

  Args:
    query: Rotated.
    spokesmen: One key for each block.
    position: Of the query.
    size: Keys of a block.
    k: Blocks that the query reads, its own included.
  """
  query = query.astype(jnp.float32).sum(axis=2)
  scores = jnp.einsum("BKH,BKCH->BKC", query, spokesmen)
  own = jnp.broadcast_to((position // size)[:, None], scores.shape[:2])
  return best(scores, own, k)


def no_keys(
    config: configs.TransformerConfig, batch_size: int, num_blocks: int
) -> Float[Array, "B K C H"]:
  """A key of zeros for each block, which sums and spokesmen begin with."""
  heads, size = config.num_kv_heads, config.head_dim
  return jnp.zeros((batch_size, heads, num_blocks, size))


def put(
    kept: Float[Array, "B K C H"],
    block: Int[Array, "B T"],
    key: Float[Array, "B T K H"],
    is_added: bool,
) -> Float[Array, "B K C H"]:
  """Adds keys to what is kept of their blocks, or puts them in its place.

  Args:
    kept: A vector for each block.
    block: Of each key; below 0 it leaves nothing.
    key: New ones.
    is_added: Whether keys are summed.
  """
  # A number below 0 would be a block from the end.
  block = jnp.where(block < 0, kept.shape[2], block)

  def one(kept: Array, block: Array, key: Array) -> Array:
    at, key = kept.at[:, block], key.swapaxes(0, 1).astype(kept.dtype)
    return (at.add if is_added else at.set)(key, mode="drop")

  return jax.vmap(one)(kept, block, key)


def select(
    query: Float[Array, "B T N H"],
    spokesmen: Float[Array, "B K C H"],
    mask: masks.Mask,
    size: int,
    k: int,
) -> selection.Selection:
  """Selects for each query by itself; the heads of a group sum their scores.

  Args:
    query: Rotated; without gradient.
    spokesmen: One key for each block.
    mask: What holds inside the blocks.
    size: Keys of a block.
    k: Blocks that a query reads, its own included.
  """
  batch, length, _, head_dim = query.shape
  num_kv_heads, num_blocks = spokesmen.shape[1:3]
  fill = num_blocks * size - length
  query = jnp.pad(query, ((0, 0), (0, fill), (0, 0), (0, 0)))
  shape = (batch, num_blocks, size, num_kv_heads, -1, head_dim)
  runs = jnp.moveaxis(query.reshape(shape).sum(axis=4), 1, 0)

  def find(run: tuple[Array, Array]) -> tuple[Array, Array]:
    # One block of queries at a time: no array is of queries by blocks.
    number, query = run
    scores = jnp.einsum("BTKH,BKCH->BKTC", query, spokesmen)
    return best(scores, jnp.broadcast_to(number, scores.shape[:-1]), k)

  blocks, is_valid = jax.lax.map(find, (jnp.arange(num_blocks), runs))
  join = lambda x: jnp.moveaxis(x, 0, 2).reshape(
      *x.shape[1:3], -1, x.shape[-1]
  )[:, :, :length]
  count = join(is_valid).sum(axis=-1).astype(jnp.int32)
  return selection.Selection(join(blocks), count, mask, 1, size)
