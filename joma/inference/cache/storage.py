"""Keys and values as a cache keeps them: floats, or int8 with a scale a slot.

Letters: B batch, K key and value heads, C slots, H head size.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.decode import slots as kernel_slots
from scansnap_jax.experiment import errors

# An array, and what `jax.tree.map` puts in its place.
Leaf = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stored:
  """Vectors of each slot.

  Attributes:
    data: [B, K, C, H], a float type or int8.
    scale: Float32 [B, K, C]: a vector is scale data; None for floats.
  """

  data: Leaf
  scale: Leaf = None


def empty(
    shape: tuple[int, int, int, int], dtype: jax.typing.DTypeLike
) -> Stored:
  """Returns slots of zeros.

  Raises:
    UserError: If `dtype` is neither a float type nor int8.
  """
  dtype = jnp.dtype(dtype)
  if dtype == jnp.int8:
    return Stored(jnp.zeros(shape, dtype), jnp.zeros(shape[:3]))
  if not jnp.issubdtype(dtype, jnp.floating):
    raise errors.UserError(
        f"dtype={dtype.name} of a KV cache must be a float type or int8."
    )
  return Stored(jnp.zeros(shape, dtype))


def read(stored: Stored) -> Float[Array, "B K C H"]:
  """Returns the vectors; of int8 as float32."""
  if stored.scale is None:
    return stored.data
  return stored.data.astype(jnp.float32) * stored.scale[..., None]


def write(stored: Stored, vectors: Float[Array, "B K C H"]) -> Stored:
  """Replaces all slots."""
  if stored.scale is None:
    return Stored(vectors.astype(stored.data.dtype))
  return Stored(*kernel_slots.quantize(vectors))


def write_slot(
    stored: Stored, vectors: Float[Array, "B K H"], slot: Int[Array, "B K"]
) -> Stored:
  """Replaces one slot of each head; beyond the last one nothing is written."""
  batch, num_kv_heads = slot.shape
  index = (
      jnp.arange(batch)[:, None],
      jnp.arange(num_kv_heads)[None, :],
      slot,
  )
  return put(
      stored,
      vectors,
      lambda x, new: x.at[index].set(new.astype(x.dtype), mode="drop"),
  )


def put(
    stored: Stored,
    vectors: Float[Array, "B K H"],
    write_array: Callable[[Array, Array], Array],
) -> Stored:
  """Writes vectors as they are kept, each array by `write_array`."""
  if stored.scale is None:
    return Stored(write_array(stored.data, vectors))
  data, scale = kernel_slots.quantize(vectors)
  return Stored(
      write_array(stored.data, data), write_array(stored.scale, scale)
  )
