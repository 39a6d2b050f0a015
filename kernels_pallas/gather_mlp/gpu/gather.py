"""Products of few rows with chosen slabs of a matrix, on Hopper GPUs.

A decoding step has few sequences, so that the matrix has the 64 rows of a
matrix instruction and the sequences are its columns. Blocks of threads share
what there is to do twice over: 64 rows or columns of the matrix, and a part of
what is summed over, whose sums are added up afterwards. Copies are a few stages
ahead. Entries of the plan that do not count are not copied.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas import interpret
from kernels_pallas.gather_mlp import parts
from kernels_pallas.hardware import gpu_layout
from kernels_pallas.hardware import types as hw_types
from kernels_pallas.transformations import manual_axes

plgpu = gpu_layout.plgpu
# Rows of a matrix instruction, and columns of a tile in shared memory.
TILE = 64
MOST_SEQUENCES = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Sizes.

  Attributes:
    num_stages: Tiles that are in shared memory at once.
    num_blocks: Blocks of threads to aim for: two for each multiprocessor.
  """

  num_stages: int = 6
  num_blocks: int = 264

  def __post_init__(self):
    for name in ("num_stages", "num_blocks"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


def into_rows(
    x: Float[Array, "B D"],
    matrix: Float[Array, "F D"],
    plan: parts.Plan,
    size: int,
    config: Config,
) -> Float[Array, "B _"]:
  """X times the rows of the plan's blocks, transposed; 0 past its number.

  Args:
    x: bfloat16 or float16; D is a multiple of 64.
    matrix: In blocks of `size` rows, a multiple of 64.
    plan: Which of them.
    size: Rows of a block.
    config: Sizes.
  """
  num_tiles = plan.blocks.shape[0] * (size // TILE)
  num_steps = x.shape[1] // TILE
  # Few tiles would leave multiprocessors idle: the sum is cut as well, and its
  # parts are added outside.
  per = _share(num_steps, num_tiles, config)
  splits = -(-num_steps // per)
  batch, x = len(x), _pad(x)

  def body(
      refs: Mapping[str, hw_types.Ref], scratch: Mapping[str, hw_types.Ref]
  ) -> None:
    split, tile = lax.axis_index("split"), lax.axis_index("tile")
    entry, part = divide(tile, size // TILE)

    @pl.when(entry < refs["table"][0])
    def _():
      first = (refs["table"][1 + entry] * (size // TILE) + part) * TILE
      low = split * per
      columns = lambda i: pl.ds((low + i) * TILE, TILE)
      total = _sum_tiles(
          scratch,
          lambda i: refs["matrix"].at[pl.ds(first, TILE), columns(i)],
          lambda i: refs["few"].at[:, columns(i)],
          jnp.minimum(per, num_steps - low),
          config.num_stages,
          is_turned=False,
      )
      refs["out"].at[split, pl.ds(tile * TILE, TILE)][...] = total

  out = _launch(
      body,
      "gather_into_rows",
      {"table": _table(plan), "matrix": matrix, "few": x},
      (splits, num_tiles * TILE, x.shape[0]),
      {"tile": num_tiles, "split": splits},
      config,
  )
  counts = jnp.arange(num_tiles * TILE) < plan.num * size
  # What was not computed is not initialised.
  return jnp.where(counts[None], out.sum(axis=0)[:, :batch].T, 0.0)


def out_of_rows(
    hidden: Float[Array, "B _"],
    matrix: Float[Array, "F D"],
    plan: parts.Plan,
    size: int,
    config: Config,
) -> Float[Array, "B D"]:
  """The sum of the rows of the plan's blocks, each as often as hidden says.

  Args:
    hidden: bfloat16 or float16.
    matrix: In blocks of `size` rows, a multiple of 64; D is a multiple of 64.
    plan: Which of them.
    size: Rows of a block.
    config: Sizes.
  """
  width, num_parts = matrix.shape[1], size // TILE
  num_steps = plan.blocks.shape[0] * num_parts
  per = _share(num_steps, width // TILE, config)
  splits = -(-num_steps // per)
  batch, hidden = len(hidden), _pad(hidden)

  def body(
      refs: Mapping[str, hw_types.Ref], scratch: Mapping[str, hw_types.Ref]
  ) -> None:
    split, tile = lax.axis_index("split"), lax.axis_index("tile")
    low = split * per
    columns = pl.ds(tile * TILE, TILE)

    def slab(i: hw_types.Index) -> hw_types.Ref:
      entry, part = divide(low + i, num_parts)
      first = (refs["table"][1 + entry] * num_parts + part) * TILE
      return refs["matrix"].at[pl.ds(first, TILE), columns]

    total = _sum_tiles(
        scratch,
        slab,
        lambda i: refs["few"].at[:, pl.ds((low + i) * TILE, TILE)],
        jnp.clip(refs["table"][0] * num_parts - low, 0, per),
        config.num_stages,
        is_turned=True,
    )
    refs["out"].at[split, columns][...] = total

  out = _launch(
      body,
      "gather_out_of_rows",
      {"table": _table(plan), "matrix": matrix, "few": hidden},
      (splits, width, hidden.shape[0]),
      {"tile": width // TILE, "split": splits},
      config,
  )
  return out.sum(axis=0)[:, :batch].T


def _sum_tiles(
    scratch: Mapping[str, hw_types.Ref],
    tile_of: Callable[[hw_types.Index], hw_types.Ref],
    few_of: Callable[[hw_types.Index], hw_types.Ref],
    count: hw_types.Count,
    num_stages: int,
    *,
    is_turned: bool,
) -> jax.Array:
  """Sums tile(i) few(i)^T, or tile(i)^T few(i)^T, copied stages ahead."""
  tiles, few, ready = (scratch[x] for x in ("tiles", "copies", "ready"))

  def fetch(i: hw_types.Index, slot: hw_types.Index) -> None:
    for source, target in ((tile_of(i), tiles), (few_of(i), few)):
      plgpu.copy_gmem_to_smem(source, target.at[slot], ready.at[slot])

  # The ring is filled before the first product waits for it.
  for i in range(num_stages):
    pl.when(i < count)(functools.partial(fetch, i, i))

  def add(accumulator: hw_types.Ref) -> jax.Array:
    def step(i: jax.Array, _: None) -> None:
      slot = lax.rem(i, num_stages)
      plgpu.barrier_wait(ready.at[slot])
      tile = tiles.at[slot]
      tile = tile.transpose((1, 0)) if is_turned else tile
      plgpu.wgmma(accumulator, tile, few.at[slot].transpose((1, 0)))
      plgpu.wgmma_wait(0)
      # The slot is free again only after the product has read it.
      after = i + num_stages
      pl.when(after < count)(lambda: fetch(after, slot))

    lax.fori_loop(0, count, step, None)
    return accumulator[...]

  shape = (TILE, few.shape[1])
  return pl.run_scoped(add, plgpu.ACC(shape, jnp.float32))


def _launch(
    body: Callable[
        [Mapping[str, hw_types.Ref], Mapping[str, hw_types.Ref]], None
    ],
    name: str,
    inputs: Mapping[str, jax.Array],
    out_shape: tuple[int, ...],
    grid: Mapping[str, int],
    config: Config,
) -> jax.Array:
  few = inputs["few"]
  stages = config.num_stages
  rows = TILE + few.shape[0]
  gpu_layout.check_smem(name, 2 * stages * rows * TILE, config)
  gpu_layout.require_jax()
  mode = interpret.mode()

  def kernel(
      table: hw_types.Ref,
      matrix: hw_types.Ref,
      few: hw_types.Ref,
      out: hw_types.Ref,
      **scratch: hw_types.Ref,
  ) -> None:
    body({"table": table, "matrix": matrix, "few": few, "out": out}, scratch)

  kernel.__name__ = name
  return plgpu.kernel(
      kernel,
      out_type=manual_axes.struct(out_shape, jnp.float32),
      scratch_types={
          "tiles": gpu_layout.tile_buffer(stages, TILE, TILE, few.dtype),
          "copies": gpu_layout.tile_buffer(
              stages, few.shape[0], TILE, few.dtype
          ),
          "ready": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
      },
      grid=tuple(grid.values()),
      grid_names=tuple(grid),
      interpret=plgpu.InterpretGPUParams() if mode is True else mode or None,
  )(*inputs.values())


def _share(num_steps: int, num_tiles: int, config: Config) -> int:
  """Steps of a block of threads, so that there are enough blocks."""
  splits = max(1, config.num_blocks // num_tiles)
  return max(1, -(-num_steps // splits))


def divide(
    i: hw_types.Index, number: int
) -> tuple[hw_types.Index, hw_types.Index]:
  """Quotient and remainder."""
  return (i, 0) if number == 1 else (lax.div(i, number), lax.rem(i, number))


def _pad(few: jax.Array) -> jax.Array:
  """Sequences to multiples of 8, the columns that an instruction may have."""
  return jnp.pad(few, ((0, -few.shape[0] % 8), (0, 0)))


def _table(plan: parts.Plan) -> jax.Array:
  return jnp.concatenate([plan.num[None], plan.blocks])
