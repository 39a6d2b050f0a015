"""What the TPU kernel over pages sees, by name.

Letters as in `api`; G = N / K.
"""

from typing import NamedTuple

import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from kernels_pallas.decode import tpu_step
from kernels_pallas.decode.paged import tpu_config
from kernels_pallas.decode.paged import tpu_copies
from kernels_pallas.hardware import types as hw_types


class Scratch(NamedTuple):
  """Kept while a sequence is computed.

  Attributes:
    logits: Of one key head, [blocks, G, slots of a block].
    queries: [K, G, H], float32, as are the next.
    outs: [K, G, H].
    read: New keys and values as they will be read, [2, K, 1, H].
    numbers: The same as they are stored.
    scales: Their scales, [2, K, 1, 1].
    tiles: Rows around the slots, [2, K, 2, rows, H], of the pool's type; the
      second half takes rows of blocks that do not have the slot.
  """

  logits: hw_types.Ref
  queries: hw_types.Ref
  outs: hw_types.Ref
  read: hw_types.Ref
  numbers: hw_types.Ref
  scales: hw_types.Ref
  tiles: hw_types.Ref


class Refs(NamedTuple):
  """What the kernel sees."""

  position: jax.Array
  vectors: list[hw_types.Ref]  # query, key, value
  out: hw_types.Ref
  slot: hw_types.Ref
  pages: tpu_copies.Pages
  scratch: Scratch

  @property
  def stored_type(self) -> jnp.dtype:
    """Of keys and values."""
    return self.pages.stored[0].dtype

  @property
  def product_type(self) -> jax.typing.DTypeLike:
    """Of factors."""
    return tpu_step.product_type(self.vectors[0].dtype, self.stored_type)


def scratch_of(
    sizes: tpu_config.Sizes, small: dict[str, jax.Array], dtype: jnp.dtype
) -> list[hw_types.Buffer]:
  """VMEM and semaphores, in the order in which the kernel takes them."""
  kv_heads, head_dim, wide = (
      sizes.call.num_kv_heads,
      sizes.call.head_dim,
      jnp.float32,
  )
  near = (kv_heads, sizes.padded_pages, sizes.page_size)
  # Two blocks, of which one is computed with while the other arrives.
  block = (2, sizes.block_pages, sizes.page_size, head_dim)
  heads = (kv_heads, sizes.call.num_groups, head_dim)
  return [
      *(pltpu.VMEM(near, x.dtype) for x in small.values()),
      pltpu.VMEM(block, dtype),
      pltpu.VMEM(block, dtype),
      pltpu.SemaphoreType.DMA,
      pltpu.SemaphoreType.DMA((2,)),
      pltpu.SemaphoreType.DMA,
      pltpu.VMEM((sizes.num_blocks, heads[1], sizes.block_slots), wide),
      pltpu.VMEM(heads, wide),
      pltpu.VMEM(heads, wide),
      pltpu.VMEM((2, kv_heads, 1, head_dim), wide),
      pltpu.VMEM((2, kv_heads, 1, head_dim), wide),
      pltpu.VMEM((2, kv_heads, 1, 1), wide),
      pltpu.VMEM((2, kv_heads, 2, sizes.call.tile_rows, head_dim), dtype),
  ]
