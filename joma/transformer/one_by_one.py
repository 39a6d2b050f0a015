"""Several tokens for a cache that holds something, each in its turn.

What a token may see can depend on what left for the one before it, so that a
cache takes them one after the other; all else of a model, projections and MLPs,
has them at once.

Letters: B batch, T new tokens, N query heads, K key and value heads, H head
size.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from joma.transformer import hooks

Cache = TypeVar("Cache")


def attend(
    take: Callable[..., tuple[Array, Cache]],
    cache: Cache,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    positions: Int[Array, "B T"],
    rotate: hooks.Rotate,
    options: hooks.AttentionOptions,
) -> tuple[Float[Array, "B T N H"], Cache]:
  """Takes each token by itself; padding at the end takes no time.

  Args:
    take: The cache's class's `attend`, which takes single tokens.
    cache: Before the first.
    query: Not rotated.
    key: Likewise.
    value: Of the same tokens.
    positions: -1 is padding, wherever it stands.
    rotate: As in `hooks.KVCache`.
    options: As there.

  Returns:
    What the calls gave, [B, T, N, H], and the cache after the last.
  """
  is_token = (positions >= 0).any(axis=0)
  stop = jnp.max(jnp.where(is_token, jnp.arange(len(is_token)) + 1, 0))

  def step(
      at: Int[Array, ""], so_far: tuple[Array, Cache]
  ) -> tuple[Array, Cache]:
    out, cache = so_far
    one = lambda x: jax.lax.dynamic_slice_in_dim(x, at, 1, axis=1)
    row, cache = take(
        cache,
        one(query),
        one(key),
        one(value),
        one(positions),
        rotate,
        _one_token(options, one, query.shape[1]),
    )
    row = row.astype(out.dtype)
    return jax.lax.dynamic_update_slice_in_dim(out, row, at, axis=1), cache

  return jax.lax.fori_loop(0, stop, step, (jnp.zeros_like(query), cache))


def _one_token(
    options: hooks.AttentionOptions,
    one: Callable[[Array], Array],
    length: int,
) -> hooks.AttentionOptions:
  """Options whose call, if any, is that of the one token."""
  call = options.call
  if call is None:
    return options
  has_tokens = lambda x: x.ndim > 1 and x.shape[1] == length
  call = dataclasses.replace(
      call,
      x=one(call.x),
      positions=one(call.positions),
      carry=jax.tree.map(
          lambda x: one(x) if has_tokens(x) else x, dict(call.carry)
      ),
  )
  return dataclasses.replace(options, call=call)


def but_first(
    at_once: Callable[..., tuple[Array, Cache]],
    take: Callable[..., tuple[Array, Cache]],
    cache: Cache,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    positions: Int[Array, "B T"],
    *arguments: Any,
) -> tuple[Float[Array, "B T N H"], Cache]:
  """Takes a single token, or a first prompt, at once, all else one by one.

  Args:
    at_once: Takes the cache and what follows it here.
    take: As in `attend`, and so on.
    cache: Likewise.
    query: Likewise.
    key: Likewise.
    value: Likewise.
    positions: Likewise.
    *arguments: `rotate` and `options`.
  """
  given = (query, key, value, positions, *arguments)
  if query.shape[1] == 1:
    return at_once(cache, *given)
  return unless_new(
      (positions[:, 0] <= 0).all(),
      lambda: at_once(cache, *given),
      take,
      cache,
      *given,
  )


def unless_new(
    is_new: Bool[Array, ""],
    at_once: Callable[[], tuple[Array, Cache]],
    take: Callable[..., tuple[Array, Cache]],
    cache: Cache,
    *arguments: Any,
) -> tuple[Float[Array, "B T N H"], Cache]:
  """Takes a prompt at once where nothing came before it, else one by one.

  Args:
    is_new: Whether the cache is empty.
    at_once: Reads a first prompt.
    take: As in `attend`, and so on.
    cache: Likewise.
    *arguments: Likewise.
  """
  return jax.lax.cond(is_new, at_once, lambda: attend(take, cache, *arguments))
