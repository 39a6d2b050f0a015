"""How far an index is from the attention that it chooses for.

Letters: B batch, T queries, S keys, J heads of the indexer, E their size.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from joma.transformer import hooks
from joma.transformer.weighing import parts
from joma.transformer.weighing import rows

# Queries of which weights are one array.
_SIZE = 128


def distance(
    score: Callable[[Array, Array, Array], Array],
    index: tuple[
        Float[Array, "B T J E"], Float[Array, "B T J"], Float[Array, "B S E"]
    ],
    call: hooks.Call,
    made: hooks.Made,
) -> Float[Array, ""]:
  """Mean over tokens of KL(mean weights of the heads | softmax of the index).

  Over the keys that were read, a part of the queries after the other: memory
  O(T). What attends gets no gradient.

  Args:
    score: Of the index, [B, T, S].
    index: Queries, weights of their heads, and keys.
    call: Of the layer.
    made: What it has made, without a cache.
  """
  assert made.where is not None  # There is no cache.
  attended, key = map(jax.lax.stop_gradient, (made.query, made.key))
  index_query, weight, index_key = index
  length = attended.shape[1]
  size = min(_SIZE, length)
  fill = lambda x: jnp.pad(
      x, ((0, 0), (0, -length % size)) + ((0, 0),) * (x.ndim - 2)
  )
  queries = tuple(map(fill, (attended, index_query, weight, call.positions)))
  where = parts.filled(made.where, queries[0].shape[1])

  @jax.checkpoint
  def part(start: Int[Array, ""]) -> Float[Array, "B t"]:
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, 1)
    query, own_query, own_weight, places = map(cut, queries)
    logits = rows.masked_logits(
        query,
        key,
        parts.rows_of(where, start, size),
        made.options,
        (places, call.positions),
    )
    is_read = ~jnp.isneginf(logits).all(axis=1)
    has_any = is_read.any(axis=-1, keepdims=True)
    logits = jnp.where(has_any[:, None], logits, 0.0)
    weights, _ = rows.of_logits(logits, query, made.options)
    share = jax.lax.stop_gradient(weights).mean(axis=1)
    scores = score(own_query, own_weight, index_key)
    scores = jnp.where(is_read | ~has_any, scores, -jnp.inf)
    apart = jax.scipy.special.xlogy(share, share) - jnp.where(
        share > 0, share * jax.nn.log_softmax(scores), 0.0
    )
    return jnp.where(has_any[..., 0], apart.sum(axis=-1), 0.0)

  starts = jnp.arange(0, queries[0].shape[1], size)
  apart = jax.lax.map(part, starts).swapaxes(0, 1)
  is_token = call.positions >= 0
  apart = apart.reshape(len(is_token), -1)[:, :length]
  return (apart * is_token).sum() / jnp.maximum(is_token.sum(), 1)
