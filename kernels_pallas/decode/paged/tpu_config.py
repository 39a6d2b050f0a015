"""How many pages a TPU takes at a time, and what fits its memories.

Letters as in `decode`. A page is a copy of its own, so that it may be anywhere.
"""

from typing import NamedTuple

import jax
from jax.experimental import pallas as pl

from kernels_pallas.decode import slots as slots_lib
from kernels_pallas.decode import tpu_config
from kernels_pallas.hardware import tpu_layout
from kernels_pallas.transformations import exported

_LANES = tpu_layout.LANES
_SUBLANES = 8
_MIB = 1 << 20
# Slots of a block, if pages are not larger than an eighth: as many as a step
# over slots takes, so that latencies overlap.
_BLOCK_SLOTS = 1024
# Of scalar memory, what the compiler keeps.
_SMEM_KEPT = 32 << 10


class Sizes(NamedTuple):
  """Of a call over pages."""

  call: tpu_config.Sizes  # With as many slots as pages of a row may have.
  most_pages: int  # M
  page_size: int  # S
  total_pages: int  # P

  @property
  def block_pages(self) -> int:
    """Pages of a block: whole registers of scores, a page a sublane."""
    # Not fewer than 8: scores of a block are whole registers.
    wanted = max(_BLOCK_SLOTS // self.page_size, _SUBLANES)
    return min(wanted, tpu_layout.round_up(self.most_pages, _SUBLANES))

  @property
  def num_blocks(self) -> int:
    """Of a row at most."""
    return -(-self.most_pages // self.block_pages)

  @property
  def padded_pages(self) -> int:
    """Of all blocks."""
    return self.num_blocks * self.block_pages

  @property
  def block_slots(self) -> int:
    """Slots of a block."""
    return self.block_pages * self.page_size


def sizes_of(
    query: jax.Array | jax.ShapeDtypeStruct,
    pool: slots_lib.Slots,
    page_table: jax.Array | jax.ShapeDtypeStruct,
) -> Sizes:
  """Sizes of query [B, N, H], a pool, and a table [B K, M].

  Raises:
    ValueError: If a TPU has no such type.
  """
  tpu_config.check_types(query.dtype, pool.key.dtype)
  batch, num_heads, head_dim = query.shape
  total_pages, page_size = pool.pos.shape
  num_rows, most_pages = page_table.shape
  call = tpu_config.Sizes(
      batch,
      num_heads,
      num_rows // batch,
      most_pages * page_size,
      head_dim,
      query.dtype.itemsize,
      pool.key.dtype.itemsize,
  )
  return Sizes(call, most_pages, page_size, total_pages)


def check(sizes: Sizes) -> None:
  """Refuses pages that are no tiles, and what the memories cannot hold.

  Raises:
    ValueError: With the arithmetic.
  """
  rows, size = sizes.call.tile_rows, sizes.page_size
  if size % rows or (_LANES % size and size % _LANES):
    fitting = [n for n in (16, 32, 64, 128) if n % rows == 0]
    raise ValueError(
        f"pages of {size} slots: with elements of"
        f" {8 * sizes.call.cache_itemsize} bits a TPU takes pages of"
        f" {', '.join(map(str, fitting))} slots or a multiple of {_LANES}"
    )
  _check_smem(sizes)
  _check_vmem(sizes)


def smem(sizes: Sizes) -> dict[str, int]:
  """Bytes of scalar memory, by what for."""
  # Of a batch that is not known what one sequence needs: whether all fit, the
  # compiler says.
  up, batch = tpu_layout.round_up, exported.known(sizes.call.batch, 1)
  num_rows = batch * sizes.call.num_kv_heads
  return {
      "page_table": 4 * up(num_rows, _SUBLANES) * up(sizes.most_pages, _LANES),
      "num_pages and positions": (
          4 * up(num_rows, _LANES) + 4 * up(batch, _LANES)
      ),
      "slots": 2 * 4 * up(sizes.call.num_kv_heads, _LANES),
  }


def vmem(sizes: Sizes) -> dict[str, int]:
  """Bytes of VMEM that a sequence takes at most, by what for."""
  up = tpu_layout.round_up
  lanes, slots = up(sizes.call.head_dim, _LANES), up(sizes.page_size, _LANES)
  groups, kv_heads = up(sizes.call.num_groups, 8), sizes.call.num_kv_heads
  num_small = 4 if sizes.call.cache_itemsize == 1 else 2
  of_row = 4 * sizes.padded_pages * slots
  blocks = 2 * (up(sizes.call.num_heads, 16) + up(kv_heads, 16))
  return {
      # Two blocks: one is computed with while the next one comes.
      "keys and values": (
          4 * sizes.block_slots * lanes * sizes.call.cache_itemsize
      ),
      "scores and positions": num_small * kv_heads * of_row,
      "logits": 4 * sizes.num_blocks * groups * up(sizes.block_slots, _LANES),
      "vectors": (
          2 * blocks * lanes * sizes.call.itemsize
          + 4 * kv_heads * lanes * (2 * groups + 4 * 8)
      ),
      "rows to write": 4 * kv_heads * 32 * lanes,
      "registers": (
          _MIB + 4 * of_row + 3 * 4 * groups * up(sizes.block_slots, _LANES)
      ),
  }


def _check_vmem(sizes: Sizes) -> None:
  need, limit = vmem(sizes), tpu_config.limit()
  if sum(need.values()) <= limit:
    return
  what = (
      f"{sizes.most_pages} pages of {sizes.page_size} slots of"
      f" {sizes.call.num_kv_heads} heads of {sizes.call.head_dim} need"
  )
  message = tpu_layout.over_vmem(what, need, limit)
  raise ValueError(f"{message}: use fewer or larger pages")


def _check_smem(sizes: Sizes) -> None:
  need = smem(sizes)
  info = tpu_layout.tpu_info()
  limit = info.smem_capacity_bytes - _SMEM_KEPT
  if sum(need.values()) <= limit:
    return
  parts = " + ".join(f"{name} {n / 1024:.1f}" for name, n in need.items())
  raise ValueError(
      f"tables of {sizes.call.batch * sizes.call.num_kv_heads} rows of"
      f" {sizes.most_pages} pages need {sum(need.values()) / 1024:.1f} KiB of"
      f" scalar memory: {parts}; a TPU {info.chip_version} has"
      f" {info.smem_capacity_bytes / 1024:.1f} KiB, of which a kernel may take"
      f" {limit / 1024:.1f}: use larger pages or fewer sequences a call"
  )


def cost_estimate(sizes: Sizes) -> pl.CostEstimate | None:
  """What XLA is told: all pages that rows may have."""
  return tpu_config.cost_estimate(sizes.call)
