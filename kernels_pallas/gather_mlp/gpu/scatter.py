"""Gradients of chosen slabs on Hopper GPUs: an outer product for each.

What a few sequences give to a weight is the product of a number for its neuron
and one for its column, summed over the sequences. Blocks of threads take 64
neurons by 64 or 128 columns; those of slabs that nobody chose write zeros, so
that every gradient is written once, and nothing is filled before.
"""

from collections.abc import Mapping
import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.gather_mlp import parts
from kernels_pallas.gather_mlp.gpu import gather
from kernels_pallas.hardware import gpu_layout
from kernels_pallas.hardware import gpu_registers
from kernels_pallas.hardware import types as hw_types
from kernels_pallas.transformations import manual_axes

plgpu = gpu_layout.plgpu
TILE = gather.TILE


def outer(
    hidden: Float[Array, "B _"],
    few: Float[Array, "B D"],
    plan: parts.Plan,
    size: int,
    num_blocks: int,
) -> Float[Array, "F D"]:
  """hidden^T few in the rows of the plan's blocks, 0 in all others.

  Args:
    hidden: Numbers of the neurons of the plan's blocks, one after the other;
      what is past its number does not count. bfloat16 or float16.
    few: In the type of hidden; D is a multiple of 64.
    plan: Which blocks.
    size: Rows of a block, a multiple of 64.
    num_blocks: F / size.
  """
  gpu_layout.require_jax()
  batch, width = few.shape
  hidden, few = (_padded(x, -batch % TILE) for x in (hidden, few))
  # Wider tiles read the numbers of the neurons fewer times.
  columns = 2 * TILE if width % (2 * TILE) == 0 else TILE
  num_parts = size // TILE

  def kernel(
      refs: Mapping[str, hw_types.Ref], scratch: Mapping[str, hw_types.Ref]
  ) -> None:
    tile, column = lax.axis_index("tile"), lax.axis_index("column")
    block, part = gather.divide(tile, num_parts)
    entry, here = refs["entries"][block], pl.ds(column * columns, columns)
    made, ready = scratch["made"], scratch["ready"]

    @pl.when(entry >= 0)
    def _():
      first = (entry * num_parts + part) * TILE
      for name, ahead in (("hidden", pl.ds(first, TILE)), ("few", here)):
        source = refs[name].at[:, ahead]
        plgpu.copy_gmem_to_smem(source, scratch[name], ready)
      plgpu.barrier_wait(ready)
      turned = scratch["hidden"].transpose((1, 0))
      product = gpu_registers.product(turned, scratch["few"])
      made[...] = product.astype(made.dtype)

    @pl.when(entry < 0)
    def _():
      zeros = gpu_registers.filled((TILE, columns), 0.0)
      made[...] = zeros.astype(made.dtype)

    plgpu.commit_smem()
    target = refs["out"].at[pl.ds(tile * TILE, TILE), here]
    plgpu.copy_smem_to_gmem(made, target)
    plgpu.wait_smem_to_gmem(0)

  buffer = functools.partial(_buffer, dtype=few.dtype)
  results = gpu_layout.launch(
      kernel,
      "scatter_outer",
      {"entries": entries(plan, num_blocks), "hidden": hidden, "few": few},
      {"out": manual_axes.struct((num_blocks * size, width), few.dtype)},
      {
          "hidden": buffer(len(few), TILE),
          "few": buffer(len(few), columns),
          "made": buffer(TILE, columns),
          "ready": plgpu.Barrier(num_arrivals=2),
      },
      {"tile": num_blocks * num_parts, "column": width // columns},
      0,  # None beside the warpgroup that orders copies: it computes, too.
  )
  return results["out"]


def entries(plan: parts.Plan, num_blocks: int) -> Int[Array, "_"]:
  """Which entry of the plan each block is, -1 for none: int32 [blocks]."""
  index = jnp.arange(plan.blocks.shape[0], dtype=jnp.int32)
  # What does not count is put past the end, and dropped.
  blocks = jnp.where(index < plan.num, plan.blocks, num_blocks)
  return jnp.full(num_blocks, -1, jnp.int32).at[blocks].set(index, mode="drop")


def _buffer(
    rows: int, columns: int, dtype: jax.typing.DTypeLike
) -> hw_types.Buffer:
  """Shared memory of a tile that TMA moves and wgmma reads."""
  transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
  return plgpu.SMEM((rows, columns), dtype, transforms=transforms)


def _padded(array: jax.Array, rows: int) -> jax.Array:
  """Rows of zeros, which add nothing: a product has 64 or 128 of them."""
  return jnp.pad(array, ((0, rows), (0, 0)))
