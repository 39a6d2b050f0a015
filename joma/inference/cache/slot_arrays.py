"""Arrays whose third axis are the slots of a cache: [B, K, C, ...].

Letters: B batch, K key and value heads, C slots, G query heads of each.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Int

from joma.inference.cache import cache_options
from joma.inference.cache import policy as policy_lib
from joma.inference.cache import storage


@dataclasses.dataclass(frozen=True)
class SlotArrays:
  """What a layer's slots hold; `kv_cache.SlotCache` attends to it.

  Attributes:
    key: [B, K, C, H].
    value: As key.
    score: Float32 [B, K, C], the policy's.
    pos: Int32 [B, K, C], the token's position; -1 is empty.
    rank: Int32 [B, K, C], its place among those kept; None if not rolled.
    aux: The policy's arrays, [B, K, C, ...] each.
    state: The policy's arrays, [B, ...] each.
    policy: Static, with its sizes set.
    options: Static.
    layer: Static.
    num_groups: G, static.
  """

  key: storage.Stored
  value: storage.Stored
  score: storage.Leaf
  pos: storage.Leaf
  rank: storage.Leaf
  aux: storage.Leaf
  state: storage.Leaf
  policy: policy_lib.Policy = dataclasses.field(metadata={"static": True})
  options: cache_options.CacheOptions = dataclasses.field(
      metadata={"static": True}
  )
  layer: int = dataclasses.field(metadata={"static": True})
  num_groups: int = dataclasses.field(metadata={"static": True})

  @property
  def capacity(self) -> int:
    """C."""
    return self.pos.shape[2]


def like(mask: Array, x: Array) -> Array:
  """A mask with axes of one for those of x that it lacks."""
  return mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))


def take(x: Array, index: Int[Array, "B K C"]) -> Array:
  """Picks slots, axis 2."""
  return jnp.take_along_axis(x, like(index, x), axis=2)


def every_slot(pos: Int[Array, "B K C"]) -> Int[Array, "B K C"]:
  """The numbers of all slots, for each head."""
  return jnp.broadcast_to(jnp.arange(pos.shape[-1]), pos.shape)


def resize(x: Array, capacity: int, fill: float | int = 0) -> Array:
  """Cuts or fills the slots' axis, 2."""
  missing = capacity - x.shape[2]
  if missing <= 0:
    return x[:, :, :capacity]
  widths = [(0, 0)] * x.ndim
  widths[2] = (0, missing)
  return jnp.pad(x, widths, constant_values=fill)


def ranks_of(pos: Int[Array, "B K C"]) -> Int[Array, "B K C"]:
  """Places in the order of positions; -1 where empty."""
  order = jnp.where(pos < 0, jnp.iinfo(jnp.int32).max, pos)
  ranks = jnp.argsort(jnp.argsort(order, axis=-1), axis=-1)
  return jnp.where(pos < 0, -1, ranks).astype(jnp.int32)
