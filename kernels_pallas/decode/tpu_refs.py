"""What the TPU kernel of a decode step sees, by name, and cuts of it.

Letters as in `decode`.
"""

from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from kernels_pallas.decode import tpu_config
from kernels_pallas.decode import tpu_step
from kernels_pallas.hardware import tpu_layout
from kernels_pallas.hardware import types as hw_types

_LANES = tpu_layout.LANES


class Scratch(NamedTuple):
  """Kept from chunk to chunk.

  Attributes:
    logits: [N, C].
    highest: m [N, 128], equal along lanes, as are the next.
    total: l.
    new_logit: Of the new token.
    slot: Of each key head [K, 128], as float32.
    acc: [N, H].
    tiles: Rows around the slots of keys and of values, [2, 2, K, rows, H]; the
      second half takes rows of chunks that do not have the slot.
    writes: A semaphore.
  """

  logits: hw_types.Ref
  highest: hw_types.Ref
  total: hw_types.Ref
  new_logit: hw_types.Ref
  slot: hw_types.Ref
  acc: hw_types.Ref
  tiles: hw_types.Ref
  writes: hw_types.Barrier


class Refs(NamedTuple):
  """What the kernel sees, by name; scales are None unless int8."""

  positions: hw_types.Ref
  vectors: list[hw_types.Ref]  # query, key, value
  small: dict[str, hw_types.Ref]  # score, pos and scales, by name
  stored: list[hw_types.Ref]  # key and value of the chunk
  out: hw_types.Ref
  slot: hw_types.Ref
  new_small: dict[str, hw_types.Ref]
  new_stored: list[hw_types.Ref]  # in HBM
  scratch: Scratch

  @property
  def stored_type(self) -> jnp.dtype:
    """Of keys and values."""
    return self.stored[0].dtype

  @property
  def product_type(self) -> jax.typing.DTypeLike:
    """Of factors."""
    return tpu_step.product_type(self.vectors[0].dtype, self.stored_type)


def scratch_of(
    sizes: tpu_config.Sizes, dtype: jnp.dtype
) -> list[hw_types.Buffer]:
  """VMEM and a semaphore, in the order of `Scratch`."""
  heads, wide = sizes.num_heads, jnp.float32
  # Whole tiles of memory for keys and values, and the same for what is dropped.
  tiles = (2, 2, sizes.num_kv_heads, sizes.tile_rows, sizes.head_dim)
  return [
      pltpu.VMEM((heads, sizes.capacity), wide),
      *(3 * [pltpu.VMEM((heads, _LANES), wide)]),
      pltpu.VMEM((sizes.num_kv_heads, _LANES), wide),
      pltpu.VMEM((heads, sizes.head_dim), wide),
      pltpu.VMEM(tiles, dtype),
      pltpu.SemaphoreType.DMA,
  ]


def lanes_of(
    sizes: tpu_config.Sizes, index: jax.Array, chunk: int
) -> hw_types.Slice:
  """The slots of a chunk; all of them need not be whole registers."""
  if chunk == sizes.capacity:
    return pl.ds(0, chunk)
  return pl.ds(pl.multiple_of(index * chunk, chunk), chunk)


def heads_of(sizes: tpu_config.Sizes, k: int) -> slice:
  """The query heads of a key head."""
  return slice(k * sizes.num_groups, (k + 1) * sizes.num_groups)
