"""Slots of the cache of NAtS-L: where chunks go, and how they are written.

Letters: B batch, T tokens, K key heads, H head size, C chunks, U tokens of a
chunk, S = (P + 1) U places of P slots and of the chunk that grows, L = C U.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from joma.systems.routers import nats_ways


def places(
    is_kept: Bool[Array, "B C K"],
    num_whole: Int[Array, "B"],
    num_slots: int,
    size: int,
) -> tuple[Bool[Array, "B C K"], Int[Array, "B K L"]]:
  """Where a first prompt's chunks go: a slot, the end, or nowhere.

  Args:
    is_kept: Complete chunks that stay as keys.
    num_whole: Complete chunks of each text.
    num_slots: P.
    size: U.

  Returns:
    Whether the slot that would be next is there, and places of all tokens;
    those of chunks that go nowhere lie behind the last one.
  """
  slot = is_kept.cumsum(axis=1) - 1
  chunk = jnp.arange(is_kept.shape[1])[None]
  is_own = (chunk == num_whole[:, None])[..., None]
  has_room = slot < num_slots
  to = jnp.where(is_kept & has_room, slot, num_slots + 1)
  to = jnp.where(is_own, num_slots, to)
  place = to[..., None] * size + jnp.arange(size)[None, None, None]
  place = jnp.moveaxis(place, 2, 1).reshape(*to.shape[::2], -1)
  return has_room, place


def put(
    kept: Float[Array, "B K S H"],
    new: Float[Array, "B K L H"],
    place: Int[Array, "B K L"],
) -> Float[Array, "B K S H"]:
  """Writes; what has its place behind the end is dropped."""
  batch, heads = place.shape[:2]
  rows = jnp.arange(batch)[:, None, None], jnp.arange(heads)[None, :, None]
  return kept.at[(*rows, place)].set(new.astype(kept.dtype), mode="drop")


def whole(x: Float[Array, "B T K H"], size: int) -> Float[Array, "B L K H"]:
  """Zeros fill the last chunk."""
  found = nats_ways.in_chunks(x, size)
  return found.reshape(len(x), -1, *x.shape[2:])
