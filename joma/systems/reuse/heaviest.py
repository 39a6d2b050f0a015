"""The blocks of keys that got most attention, query by query.

Letters: B batch, T queries, S keys, N query heads, K key and value heads, H
head size, C blocks, W blocks that are chosen, V blocks that are handed on.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from joma.transformer import full_cache
from joma.transformer import hooks
from joma.transformer import layer_hooks
from joma.transformer.weighing import parts
from joma.transformer.weighing import rows
from kernels_pallas import masks

# Queries of which weights are one array.
_SIZE = 128

Places = tuple[Int[Array, "#B T"], Int[Array, "#B S"]]


def choose(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    where: masks.Mask,
    options: hooks.AttentionOptions,
    places: Places,
    size: int,
    num: int,
) -> tuple[Int[Array, "B T K W"], Bool[Array, "B T K W"]]:
  """Chooses for each query and key head, a part of the queries at a time.

  Args:
    query: Rotated.
    key: Rotated, each where its position says.
    where: What is seen.
    options: With the rule of the weights.
    places: Positions of queries and keys.
    size: Keys of a block.
    num: Blocks that are chosen, the first and the query's own among them.

  Returns:
    Blocks, and which of them count; these come first.
  """
  length = query.shape[1]
  step = min(_SIZE, length)
  fill = -length % step
  query = jnp.pad(query, ((0, 0), (0, fill), (0, 0), (0, 0)))
  own_places = jnp.pad(places[0], ((0, 0), (0, fill)))
  seen = parts.filled(where, length + fill)
  query, key = map(jax.lax.stop_gradient, (query, key))

  def part(start: Int[Array, ""]) -> tuple[Array, Array]:
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, step, 1)
    logits = rows.masked_logits(
        cut(query),
        key,
        parts.rows_of(seen, start, step),
        options,
        (cut(own_places), places[1]),
    )
    is_empty = jnp.isneginf(logits).all(axis=-1, keepdims=True)
    logits = jnp.where(is_empty, 0.0, logits)
    weights, _ = rows.of_logits(logits, cut(query), options)
    mass = block_mass(jax.lax.stop_gradient(weights), key.shape[2], size)
    own = jnp.broadcast_to(cut(own_places), mass.shape[:1] + (step,)) // size
    return top(mass, own[:, None], num)

  blocks, is_valid = jax.lax.map(part, jnp.arange(0, length + fill, step))
  join = lambda x: (
      x.transpose(1, 0, 3, 2, 4).reshape(
          len(key), -1, *x.shape[2:3], x.shape[4]
      )
  )[:, :length]
  return join(blocks), join(is_valid)


def choose_of_cache(
    call: hooks.Call, made: hooks.Made, size: int, num: int
) -> tuple[Int[Array, "B T K W"], Bool[Array, "B T K W"]]:
  """As `choose`, for new tokens whose keys are in a cache of whole blocks."""
  cache: Any = made.kv_cache
  if isinstance(cache, layer_hooks.PreparedCache):
    cache = cache.kv_cache
  key = cache.kept.key.swapaxes(1, 2)
  return choose(
      call.rotate(made.query, call.positions),
      key,
      full_cache.spans_up_to(call.positions, made.options.window),
      made.options,
      (call.positions, jnp.arange(key.shape[1])[None]),
      size,
      num,
  )


def share_handed(
    own: Int[Array, "B T K W"],
    is_own: Bool[Array, "B T K W"],
    handed: Int[Array, "B T K V"],
    is_handed: Bool[Array, "B T K V"],
) -> Float[Array, "B T K"]:
  """Share of a choice that is among what was handed on."""
  same = (own[..., None] == handed[..., None, :]) & is_handed[..., None, :]
  same = same.any(axis=-1) & is_own
  return same.sum(axis=-1) / jnp.maximum(is_own.sum(axis=-1), 1)


def block_mass(
    weights: Float[Array, "B N T S"], num_kv_heads: int, size: int
) -> Float[Array, "B K T C"]:
  """Weights summed over the heads of a group and the keys of a block."""
  batch, _, length, num_keys = weights.shape
  grouped = weights.reshape(batch, num_kv_heads, -1, length, num_keys)
  mass = grouped.sum(axis=2)
  mass = jnp.pad(mass, ((0, 0), (0, 0), (0, 0), (0, -num_keys % size)))
  return mass.reshape(batch, num_kv_heads, length, -1, size).sum(axis=-1)


def top(
    mass: Float[Array, "B K T C"],
    own: Int[Array, "#B #K T"],
    num: int,
    is_forced: bool = True,
) -> tuple[Int[Array, "B K T W"], Bool[Array, "B K T W"]]:
  """The heaviest blocks up to a query's own; if forced, that and the first."""
  block = masks.to_rank(jnp.arange(mass.shape[-1]), 4)
  own = own[..., None]
  if is_forced:
    mass = jnp.where((block == 0) | (block == own), jnp.inf, mass)
  mass = jnp.where(block <= own, mass, -jnp.inf)
  greatest, blocks = jax.lax.top_k(mass, min(num, mass.shape[-1]))
  return blocks.astype(jnp.int32), greatest > -jnp.inf
