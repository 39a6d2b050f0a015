"""The keys of greatest index, query by query.

  I_ts = sum_j w_tj ReLU(q_tj k_s)

of J small heads (https://arxiv.org/abs/2512.02556); a block's is its keys'
greatest.

Letters: B batch, D width, T queries, S keys, J heads of the index, E their
size, W blocks that are read.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from joma.transformer import hooks
from kernels_pallas import masks
from kernels_pallas import selection

# Queries that choose at a time: no array is of queries by keys.
_SIZE = 128
Index = tuple[
    Float[Array, "B T J E"], Float[Array, "B T J"], Float[Array, "B S E"]
]


def keys(params: hooks.Params, call: hooks.Call) -> Float[Array, "B T E"]:
  """Index keys, rotated, float32."""
  found = jnp.einsum("BTD,DE->BTE", _input(call), params["key"])
  return call.rotate(found[:, :, None], call.positions)[:, :, 0]


def queries(
    params: hooks.Params, call: hooks.Call
) -> tuple[Float[Array, "B T J E"], Float[Array, "B T J"]]:
  """Index queries, rotated, and the weights of their heads; float32."""
  query = jnp.einsum("BTD,DJE->BTJE", _input(call), params["query"])
  weight = jnp.einsum("BTD,DJ->BTJ", _input(call), params["weight"])
  num_heads, size = query.shape[2:]
  factor = (size * num_heads) ** -0.5
  return call.rotate(query, call.positions), factor * weight


def _input(call: hooks.Call) -> Float[Array, "B T D"]:
  """What the layer reads: the index is no reason for it to change."""
  return jax.lax.stop_gradient(call.x).astype(jnp.float32)


def scores(
    query: Float[Array, "B T J E"],
    weight: Float[Array, "B T J"],
    key: Float[Array, "B S E"],
) -> Float[Array, "B T S"]:
  """I, of every pair."""
  products = jnp.einsum("BTJE,BSE->BTJS", query, key)
  return jnp.einsum("BTJ,BTJS->BTS", weight, jax.nn.relu(products))


def best(
    scores: Float[Array, "B T S"], last: Int[Array, "B T"], k: int, size: int
) -> tuple[Int[Array, "B T W"], Bool[Array, "B T W"]]:
  """Blocks of the greatest scores of keys up to each query's last.

  Args:
    scores: As above; without gradient here.
    last: Of each query.
    k: Keys that are read, a multiple of `size`.
    size: Keys of a block.
  """
  scores = jax.lax.stop_gradient(scores)
  place = jnp.arange(scores.shape[-1])[None, None]
  scores = jnp.where(place <= last[..., None], scores, -jnp.inf)
  fill = ((0, 0), (0, 0), (0, -scores.shape[-1] % size))
  scores = jnp.pad(scores, fill, constant_values=-jnp.inf)
  of_blocks = scores.reshape(*last.shape, -1, size).max(axis=-1)
  width = min(k // size, of_blocks.shape[-1])
  greatest, blocks = jax.lax.top_k(of_blocks, width)
  return blocks.astype(jnp.int32), greatest > -jnp.inf


def select(
    index: Index, mask: masks.Mask, k: int, size: int
) -> selection.Selection:
  """Blocks of each query of whole texts, the same for all heads.

  Args:
    index: Queries, weights of their heads, and keys.
    mask: What holds inside the blocks.
    k: As in `best`.
    size: Likewise.
  """
  query, weight, key = index
  batch, length, _ = key.shape
  step = min(_SIZE, length)
  if k >= length:
    # Nothing is chosen: queries read all keys together, none gathers its own.
    return selection.from_mask(
        mask, length, length, block_q=step, block_kv=_SIZE
    )
  cut = (
      lambda x: jnp.pad(
          x, ((0, 0), (0, -length % step)) + ((0, 0),) * (x.ndim - 2)
      )
      .reshape(batch, -1, step, *x.shape[2:])
      .swapaxes(0, 1)
  )

  def find(part: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    query, weight, start = part
    last = jnp.broadcast_to(start + jnp.arange(step)[None], (batch, step))
    return best(scores(query, weight, key), last, k, size)

  starts = jnp.arange(0, length, step)
  blocks, is_valid = jax.lax.map(find, (cut(query), cut(weight), starts))
  join = lambda x: x.swapaxes(0, 1).reshape(batch, 1, -1, x.shape[-1])
  count = join(is_valid)[:, :, :length].sum(axis=-1).astype(jnp.int32)
  return selection.Selection(join(blocks)[:, :, :length], count, mask, 1, size)
