"""What attention takes of the memories of a TPU, and what there is.

Arithmetic on what `pltpu.get_tpu_info` says of a chip, so that a program can be
made for a chip that is not there.
"""

from kernels_pallas.attention.tpu import fetch
from kernels_pallas.attention.tpu.layout import Sizes
from kernels_pallas.attention.tpu.layout import Tiles
from kernels_pallas.hardware import tpu_layout

_MIB = 1 << 20
_LANES = tpu_layout.LANES


def forward_vmem(
    sizes: Sizes,
    tiles: Tiles,
    chunk: int,
    place: fetch.Place,
    emits_col_mass: bool,
) -> dict[str, int]:
  """Bytes of VMEM that `forward` takes, by what for.

  Registers that run out are part of it. As compiled kernels show, they fill up
  to a tile of logits more where keys are streamed, and of float32 the three
  parts that factors of products are cut into.
  """
  lanes_h, size = round_up(sizes.head_dim), sizes.itemsize
  num_keys = tpu_layout.round_up(sizes.num_keys, tiles.block_kv)
  # The next head's keys arrive during this one, unless there is no room.
  buffers = 1 if place == "vmem_once" else 2
  held = tiles.block_kv if place == "hbm" else num_keys
  parts = (size == 4) * 3 * 2 * (tiles.lanes_q + tiles.block_kv) * lanes_h
  return {
      "logits": 4 * chunk * tiles.area,
      "keys and values": buffers * held * 2 * lanes_h * size,
      "values turned": (place != "hbm") * num_keys * sizes.head_dim * size,
      "queries and out": tiles.lanes_q * (4 * lanes_h * size + 4 * lanes_h),
      "masks and rows": 8 * 4 * 8 * tiles.lanes_q + 2 * 4 * num_keys,
      "column sums": emits_col_mass * 2 * 4 * num_keys,
      "registers": _MIB + 4 * (place == "hbm") * tiles.area + parts,
  }


def col_mass_vmem(
    sizes: Sizes, tiles: Tiles, place: fetch.Place
) -> dict[str, int]:
  """Bytes of VMEM that `col_mass` takes, by what for."""
  lanes_h, size = round_up(sizes.head_dim), sizes.itemsize
  num_rows = -(-sizes.num_queries // tiles.block_q)
  buffers = 1 if place == "vmem_once" else 2
  held = tiles.lanes_q * (1 if place == "hbm" else num_rows)
  return {
      "queries": buffers * held * lanes_h * size,
      "keys": 2 * tiles.block_kv * lanes_h * size,
      # Two spans, ids, lse and weights, in two buffers.
      "rows": 2 * 7 * 4 * num_rows * tiles.lanes_q,
      "column sums": 4 * _LANES * tiles.block_kv,
      "registers": _MIB + 4 * tiles.area,
  }


def limit() -> int:
  """Bytes of VMEM that a kernel here may take."""
  return tpu_layout.tpu_info().vmem_capacity_bytes * 15 // 16


def too_large(tiles: Tiles, need: dict[str, int]) -> str:
  """The arithmetic, and what to do."""
  what = f"block_q={tiles.block_q} x block_kv={tiles.block_kv} needs"
  return tpu_layout.over_vmem(what, need, limit()) + ": use smaller tiles"


def check_smem(width: int, tiles: Tiles) -> None:
  """Raises ValueError if lists of so many tiles do not fit into SMEM."""
  # Two buffers of the lists of this row and of the one before.
  need = 4 * 4 * (width + 2)
  limit = tpu_layout.tpu_info().smem_capacity_bytes * 15 // 16
  if need > limit:
    raise ValueError(
        f"block_q={tiles.block_q} x block_kv={tiles.block_kv} makes lists of"
        f" {width} tiles, {need / _MIB:.1f} MiB of SMEM, of which there are"
        f" {limit / _MIB:.1f}: use larger tiles"
    )


def round_up(number: int) -> int:
  """The next multiple of the 128 lanes."""
  return tpu_layout.round_up(max(number, 1), _LANES)
