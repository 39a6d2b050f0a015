"""How many slots of a cache a TPU takes at a time, and what fits its VMEM."""

import dataclasses
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from kernels_pallas.decode import cost
from kernels_pallas.decode import shapes
from kernels_pallas.decode import slots as slots_lib
from kernels_pallas.hardware import tpu_layout
from kernels_pallas.transformations import exported

_LANES = tpu_layout.LANES
_MIB = 1 << 20
# Bytes of a block of keys at most: they hide what a step of the grid costs.
_BLOCK_BYTES = 2 * _MIB
# Nothing is computed while the first block comes: a small part of the whole, if
# that leaves enough slots for their latencies to overlap.
_MIN_STEPS, _MIN_CHUNK = 4, 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Sizes.

  Attributes:
    chunk: Slots of a step, which divide the capacity: all, or a multiple of the
      128 lanes; None is up to two MiB of keys.
  """

  chunk: int | None = None

  def __post_init__(self):
    if self.chunk is not None and self.chunk < 1:
      raise ValueError(f"chunk={self.chunk} must be at least 1")


class Sizes(NamedTuple):
  """Of a call, and bytes of an element of the query and of the cache."""

  batch: int
  num_heads: int
  num_kv_heads: int
  capacity: int
  head_dim: int
  itemsize: int
  cache_itemsize: int
  has_votes: bool = False

  @property
  def num_groups(self) -> int:
    """G, query heads of a key head."""
    return self.num_heads // self.num_kv_heads

  @property
  def tile_rows(self) -> int:
    """Rows that memory moves together: 8 of 32 bits."""
    return 32 // self.cache_itemsize


def choose_chunk(config: Config, sizes: Sizes) -> int:
  """The slots of a step.

  Raises:
    ValueError: If the capacity is not whole tiles, or the chunk asked for does
      not divide it.
  """
  capacity, rows = sizes.capacity, sizes.tile_rows
  if capacity % rows:
    raise ValueError(
        f"a capacity of {capacity} slots must be a multiple of {rows}, the rows"
        " of a tile of a TPU with elements of"
        f" {8 * sizes.cache_itemsize} bits, such as"
        f" {tpu_layout.round_up(capacity, rows)}"
    )
  if config.chunk is not None:
    chunk = config.chunk
    if capacity % chunk or (chunk != capacity and chunk % _LANES):
      raise ValueError(
          f"chunk={chunk} must divide the {capacity} slots, and be a multiple"
          f" of the {_LANES} lanes of a TPU or all of them"
      )
    return chunk
  # Chunks divide the slots: a ragged last one would need a mask in every chunk.
  divisors = [n for n in range(_LANES, capacity, _LANES) if capacity % n == 0]
  row = sizes.num_kv_heads * sizes.head_dim * sizes.cache_itemsize
  part = exported.known(sizes.batch, _MIN_STEPS) * capacity // _MIN_STEPS
  # Large blocks hide the cost of a step; small ones begin to compute earlier.
  most = min(_BLOCK_BYTES // row, max(part, _MIN_CHUNK))
  fits = lambda n: n <= most and sum(vmem(n, sizes).values()) <= limit()
  divisors.append(capacity)
  return max(filter(fits, divisors), default=divisors[0])


def vmem(chunk: int, sizes: Sizes) -> dict[str, int]:
  """Bytes of VMEM that a step takes at most, by what for.

  Blocks are there twice, to be copied ahead.
  """
  up = tpu_layout.round_up
  lanes = up(sizes.head_dim, _LANES)
  slots = up(sizes.capacity, _LANES)
  heads, kv_heads = up(sizes.num_heads, 8), up(sizes.num_kv_heads, 8)
  # Score and position, with int8 two scales, and votes where there are any.
  num_small = (4 if sizes.cache_itemsize == 1 else 2) + sizes.has_votes
  tile = sizes.num_kv_heads * 32 * lanes
  vectors = 2 * up(sizes.num_heads, 16) + 2 * up(sizes.num_kv_heads, 16)
  stored = sizes.cache_itemsize * up(chunk, sizes.tile_rows) * lanes
  return {
      "keys and values": 4 * sizes.num_kv_heads * stored,
      "scores and positions": 2 * 2 * num_small * 4 * kv_heads * slots,
      "logits": 4 * heads * slots,
      "vectors": (
          2 * vectors * lanes * sizes.itemsize
          + 4 * heads * (lanes + 4 * _LANES)
      ),
      "rows to write": 4 * tile,
      "registers": (
          _MIB + 3 * 4 * heads * up(chunk, _LANES) + 4 * 4 * kv_heads * slots
      ),
  }


def check_vmem(chunk: int, sizes: Sizes) -> None:
  """Raises ValueError, with the arithmetic, if a step does not fit."""
  need = vmem(chunk, sizes)
  if sum(need.values()) <= limit():
    return
  what = (
      f"{sizes.capacity} slots of {sizes.num_kv_heads} heads of"
      f" {sizes.head_dim}, in chunks of {chunk}, need"
  )
  message = tpu_layout.over_vmem(what, need, limit())
  raise ValueError(f"{message}: use a smaller chunk or fewer slots")


def check_types(
    query: jax.typing.DTypeLike, stored: jax.typing.DTypeLike
) -> None:
  """Raises ValueError if a TPU kernel does not take these types."""
  types = (jnp.float32, jnp.bfloat16)
  if query not in types or stored not in (*types, jnp.int8):
    raise ValueError(
        f"query is {query} and the cache {stored}; the TPU kernel takes float32"
        " and bfloat16, and of the cache also int8"
    )


def sizes_of(query: jax.Array, cache: slots_lib.Slots) -> Sizes:
  """Sizes of query [B, N, H] and a cache.

  Raises:
    ValueError: If a TPU has no such type.
  """
  check_types(query.dtype, cache.key.dtype)
  batch, num_heads, head_dim = query.shape
  return Sizes(
      batch,
      num_heads,
      cache.pos.shape[1],
      cache.capacity,
      head_dim,
      query.dtype.itemsize,
      cache.key.dtype.itemsize,
      cache.votes is not None,
  )


def limit() -> int:
  """Bytes of VMEM that a kernel here may take."""
  return tpu_layout.tpu_info().vmem_capacity_bytes * 15 // 16


def cost_estimate(sizes: Sizes) -> pl.CostEstimate | None:
  """What XLA is told."""
  shape = shapes.Shape(**{
      name: getattr(sizes, name)
      for name in (
          "batch",
          "num_heads",
          "num_kv_heads",
          "capacity",
          "head_dim",
      )
  })
  work = cost.step(
      shape, itemsize=sizes.itemsize, cache_itemsize=sizes.cache_itemsize
  )
  return exported.estimate(**dataclasses.asdict(work))
