"""How much of a gathered MLP is in the VMEM of a TPU at a time.

Weights that are fetched once are the point: as many sequences as fit share a
pass over the plan, then blocks are cut into slabs.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from kernels_pallas.hardware import tpu_layout
from kernels_pallas.transformations import exported

_MIB = 1 << 20
_LANES = tpu_layout.LANES
# More would make code of many thousand bundles.
_MOST_SEQUENCES = 256

_TilesT = TypeVar("_TilesT")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Sizes.

  Attributes:
    rows: Neurons of a slab, which is copied at a time: a divisor of the block
      size, a multiple of 8 (16 for bfloat16). None is what fits.
    batch: Sequences of a tile, a multiple of the same; all of them read the
      plan's blocks together. None is what fits.
  """

  rows: int | None = None
  batch: int | None = None

  def __post_init__(self):
    for name in ("rows", "batch"):
      size = getattr(self, name)
      if size is not None and (size < 1 or size % 8):
        raise ValueError(f"{name}={size} must be a positive multiple of 8")


class Sizes(NamedTuple):
  """Of a call."""

  batch: int
  width: int
  block_size: int
  num_entries: int
  num_neurons: int
  num_matrices: int
  dtype: jax.typing.DTypeLike
  has_members: bool
  num_biases: int


class Tiles(NamedTuple):
  """What is chosen: neurons of a slab, sequences of a tile."""

  rows: int
  batch: int


def choose(config: Config, sizes: Sizes, is_backward: bool) -> Tiles:
  """The first tiles of an MLP that fit: most sequences, then most neurons.

  Raises:
    ValueError: If a TPU has no such type, sizes fill no registers, or what is
      asked does not fit.
  """
  unit = unit_of(sizes.dtype)
  if sizes.block_size % unit:
    raise ValueError(
        f"block_size={sizes.block_size} must be a multiple of {unit}: rows of"
        f" {jnp.dtype(sizes.dtype).name} are that many a tile of TPU memory"
    )
  rows = config.rows or sizes.block_size
  if sizes.block_size % rows or rows % unit:
    raise ValueError(
        f"rows={rows} must divide block_size={sizes.block_size} and be a"
        f" multiple of {unit}"
    )
  all_rows = [rows] if config.rows else _halves(rows, unit)
  all_tiles = [
      Tiles(rows, batch)
      for batch in batches(config, sizes)
      for rows in all_rows
  ]
  return first_that_fits(
      all_tiles,
      lambda tiles: vmem(tiles, sizes, is_backward),
      lambda tiles: (
          f"{tiles.rows} neurons of width {sizes.width} and {tiles.batch}"
          " sequences"
      ),
  )


def batches(config: Config, sizes: Sizes) -> list[int]:
  """Sequences of a tile that may be tried, most first.

  Raises:
    ValueError: If a TPU has no such type, or what is asked fills no registers.
  """
  unit = unit_of(sizes.dtype)
  if config.batch is None:
    return _tiles_of(exported.known(sizes.batch, _MOST_SEQUENCES), unit)
  if config.batch % unit:
    raise ValueError(f"batch={config.batch} must be a multiple of {unit}")
  return [config.batch]


def first_that_fits(
    all_tiles: Sequence[_TilesT],
    need_of: Callable[[_TilesT], dict[str, int]],
    name_of: Callable[[_TilesT], str],
) -> _TilesT:
  """Of some tiles, the first whose bytes fit.

  Args:
    all_tiles: To try.
    need_of: Gives bytes by what for.
    name_of: Says what the tiles are of.

  Raises:
    ValueError: If none does: what the last of them needs.
  """
  # Best first: the first that fits is taken.
  for tiles in all_tiles:
    if sum(need_of(tiles).values()) <= limit():
      return tiles
  need = need_of(all_tiles[-1])
  what = f"{name_of(all_tiles[-1])} at a time need"
  message = tpu_layout.over_vmem(what, need, limit())
  raise ValueError(f"{message}: use smaller rows or batch")


def vmem(tiles: Tiles, sizes: Sizes, is_backward: bool) -> dict[str, int]:
  """Bytes of VMEM that a kernel takes at most, by what for.

  Arrays of a tile are there twice, to be copied ahead, as slabs are.
  """
  itemsize = jnp.dtype(sizes.dtype).itemsize
  row = tpu_layout.round_up(sizes.width, _LANES)
  tile, slab = tiles.batch * row, tiles.rows * row
  entries = tpu_layout.round_up(sizes.num_entries, _LANES)
  lanes = tpu_layout.round_up(tiles.rows, _LANES)
  count = sizes.num_matrices
  parts = sizes.block_size // tiles.rows
  need = {
      "x": 2 * tile * itemsize,
      "sums": 2 * 4 * tile,
      "slabs": 2 * count * slab * itemsize,
      "biases": (
          2
          * 4
          * sizes.num_biases
          * (sizes.num_neurons // tiles.rows + 8)
          * lanes
      ),
      "members": 2 * 4 * tiles.batch * entries * sizes.has_members,
      # A product before it is added, and what neurons are.
      "registers": (
          _MIB
          + _spilled(itemsize, tiles.rows) * 4 * tile
          + 8 * 4 * tiles.batch * lanes
      ),
  }
  if not is_backward:
    return need
  # Then gradients come from HBM, are added to and go back, in float32.
  is_cut = not exported.is_known(sizes.batch) or sizes.batch > tiles.batch
  need["gradients"] = 2 * count * slab * (8 if is_cut else itemsize)
  need["gradients of biases"] = (
      2 * 4 * sizes.num_biases * (sizes.num_entries * parts + 8) * lanes
  )
  need["x"] *= 2
  need["registers"] += 2 * 4 * slab
  return need


def _spilled(itemsize: int, rows: int) -> int:
  """Tiles of float32 that registers do not hold.

  An exact product of float32 is six of bfloat16 pieces, which are kept for each
  128 rows of a slab: libtpu 0.0.42 takes 8.6 tiles for 128 rows and 20 for 256.
  """
  return 2 + -(-10 * rows // _LANES) if itemsize == 4 else 1


def limit() -> int:
  """Bytes of VMEM that a kernel here may take."""
  return tpu_layout.tpu_info().vmem_capacity_bytes * 15 // 16


def unit_of(dtype: jax.typing.DTypeLike) -> int:
  """Rows of a tile of memory.

  Raises:
    ValueError: If a TPU has no such type.
  """
  if dtype not in (jnp.float32, jnp.bfloat16):
    raise ValueError(
        f"x and weights are {jnp.dtype(dtype).name}; the TPU kernels take"
        " float32 and bfloat16"
    )
  return 32 // jnp.dtype(dtype).itemsize


def _halves(number: int, unit: int) -> list[int]:
  """It, and its halves while they are multiples of the unit."""
  found = [number]
  while found[-1] % (2 * unit) == 0:
    found.append(found[-1] // 2)
  return found


def _tiles_of(batch: int, unit: int) -> list[int]:
  """Sequences of a tile, from all of them (or many) down."""
  number = 1
  while tpu_layout.round_up(-(-batch // number), unit) > _MOST_SEQUENCES:
    number += 1
  found = [tpu_layout.round_up(-(-batch // number), unit)]
  while found[-1] > unit:
    found.append(tpu_layout.round_up(found[-1] // 2, unit))
  return found
