"""How the TPU backward cuts its work, so that each part fits into VMEM.

Letters as in `backward`.
"""

import dataclasses
import itertools
import math
from typing import Any

from jax.experimental import pallas as pl
import numpy as np

from kernels_pallas.attention import visits as visits_lib
from kernels_pallas.attention.tpu.layout import Sizes
from kernels_pallas.attention.tpu.layout import Tiles
from kernels_pallas.hardware import tpu_layout
from kernels_pallas.transformations import exported

_LANES = tpu_layout.LANES
_SUBLANES = 8
_MIB = 1 << 20
# Of query, key, value and d_out together, what sums of cores may take.
_SMALL = 0.75


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What is in VMEM at once: a chunk of the queries of some heads of a group.

  Attributes:
    sizes: Of the attention.
    tiles: Queries and keys of a tile.
    heads: G, a divisor of the query heads of a group.
    chunk: Query tiles of each of the heads, ceil(R / chunks).
    num_spans: P.
    has_ids: Whether queries and keys have ids.
    limit: Bytes of VMEM that may be taken.
    num_cores: Cores that share a kernel's grid.
  """

  sizes: Sizes
  tiles: Tiles
  heads: int
  chunk: int
  num_spans: int
  has_ids: bool
  limit: int
  num_cores: int = 1

  @property
  def num_units(self) -> int:
    """U, units of all groups."""
    return self.sizes.num_heads // self.heads

  @property
  def units_of_group(self) -> int:
    """Units that share keys."""
    return self.num_units // self.sizes.num_kv_heads

  @property
  def num_tiles(self) -> int:
    """R."""
    return self.sizes.num_queries // self.tiles.block_q

  @property
  def num_chunks(self) -> int:
    """Chunks of a head; the last may be shorter."""
    return -(-self.num_tiles // self.chunk)

  @property
  def num_parts(self) -> int:
    """Parts that add to the same dK and dV, one after the other."""
    return self.units_of_group * self.num_chunks

  @property
  def axes(self) -> tuple[int, int, int, int]:
    """Sequences, key heads, units of a group, chunks: what cores may share."""
    sizes = self.sizes
    return (
        sizes.batch,
        sizes.num_kv_heads,
        self.units_of_group,
        self.num_chunks,
    )

  @property
  def shared_axis(self) -> int | None:
    """Which of `axes` is divided among the cores, if one is.

    Cores that share the queries of a head have a dK and a dV each, in float32:
    only where those are small beside the other arrays.
    """
    if self.num_cores == 1:
      return None
    sizes = self.sizes
    keys = sizes.num_keys * sizes.num_kv_heads
    queries = sizes.num_queries * sizes.num_heads
    arrays = 2 * sizes.itemsize * (queries + keys)
    is_small = 2 * 4 * self.num_cores * keys <= _SMALL * arrays
    for axis, size in enumerate(self.axes[: 4 if is_small else 2]):
      if size % self.num_cores == 0:
        return axis
    return None

  @property
  def num_used_cores(self) -> int:
    """Cores that have a part of the work."""
    return 1 if self.shared_axis is None else self.num_cores

  @property
  def num_sums(self) -> int:
    """How many dK and dV of a head are summed side by side."""
    return self.num_used_cores if self.shared_axis in (2, 3) else 1

  @property
  def num_slots(self) -> int:
    """Buffers of sums: those of a step are stored during the next."""
    return min(2, self.num_key_tiles)

  @property
  def grid(self) -> tuple[int, ...]:
    """Steps: (b, u, p, c) in one part; in several (core, b, k, u, p, c)."""
    if self.num_parts == 1:
      return self.sizes.batch, self.num_units, 1, self.num_key_tiles
    return self.num_used_cores, *self._own_axes, self.num_key_tiles

  @property
  def parts_of_core(self) -> int:
    """Parts that a core adds up."""
    return self._own_axes[2] * self._own_axes[3]

  @property
  def _own_axes(self) -> tuple[int, int, int, int]:
    """`axes` of one core."""
    batch, heads, units, chunks = (
        size // (self.num_used_cores if axis == self.shared_axis else 1)
        for axis, size in enumerate(self.axes)
    )
    return batch, heads, units, chunks

  def place(self, *step: Any) -> tuple[Any, Any, Any, Any]:
    """Sequence, unit, chunk and tile of keys of a step of the grid."""
    if self.num_parts == 1:
      b, u, p, c = step
      return b, u, p, c
    b, k, u, p = self.own(*step[:5])
    return b, k * self.units_of_group + u, p, step[5]

  def own(self, core: Any, *places: Any) -> list[Any]:
    """Places of a core along its part of `axes`, among all of `axes`."""
    found = list(places)
    if self.shared_axis is not None:
      found[self.shared_axis] += core * self._own_axes[self.shared_axis]
    return found

  @property
  def num_key_tiles(self) -> int:
    """C."""
    return self.sizes.num_keys // self.tiles.block_kv

  def vmem(self) -> dict[str, int]:
    """Bytes of VMEM by what for. Blocks are there twice, to be copied ahead."""
    (block_q, block_kv), sizes = self.tiles, self.sizes
    lanes = tpu_layout.round_up(sizes.head_dim, _LANES)
    sublanes = tpu_layout.round_up(sizes.head_dim, 4 * _SUBLANES)
    chunk = self.heads * self.chunk
    rows = 4 * block_q * tpu_layout.round_up(self.chunk, _SUBLANES)
    num_rows = 2 * self.heads + 2 * self.num_spans + self.has_ids
    # Two blocks of each that leave by themselves; or `num_slots` of sums.
    out_bytes = 4 * sizes.itemsize if self.num_parts == 1 else 16
    return {
        "query, d_out and d_query": (
            6 * chunk * block_q * lanes * sizes.itemsize
        ),
        "sum of d_query": 4 * chunk * block_q * sublanes,
        "lse, delta and spans": 2 * rows * num_rows,
        "key and value": block_kv * (4 * lanes + sublanes) * sizes.itemsize,
        "d_key and d_value": block_kv * lanes * (out_bytes + 8),
        "key ids": 4 * block_kv * _LANES * self.has_ids,
        # As the compiler lays them out: logits and weights in float32, both
        # once more as operands, and three products. Products of float32 are
        # several of bfloat16.
        "a tile of logits": (8 + 2 * sizes.itemsize) * block_q * block_kv,
        "products": 2 * sizes.itemsize * lanes * (block_q + 2 * block_kv),
    }


def make(sizes: Sizes, tiles: Tiles, **rest: Any) -> Plan:
  """Makes the plan of fewest parts that fits, with most heads among those.

  Args:
    sizes: See `Plan`.
    tiles: See `Plan`.
    **rest: Further fields of `Plan`: num_spans, has_ids and limit.

  Raises:
    ValueError: If not even a tile of one head fits.
  """
  group = sizes.num_heads // sizes.num_kv_heads
  num_tiles = sizes.num_queries // tiles.block_q
  whole = Plan(sizes=sizes, tiles=tiles, heads=group, chunk=num_tiles, **rest)
  fitting = []
  # Parts cost a write and an addition of dK and dV each. More heads at once
  # need shorter chunks: of each number of heads the longest chunk that fits is
  # tried.
  for heads in (n for n in range(group, 0, -1) if group % n == 0):
    plans = (
        dataclasses.replace(whole, heads=heads, chunk=-(-num_tiles // n))
        for n in range(1, num_tiles + 1)
    )
    longest = list(itertools.islice(filter(_fits, plans), 2))
    # An odd number of chunks may leave a core without work where one more does
    # not.
    fitting.extend(sorted(longest, key=_idle_cores)[:1])
  if not fitting:
    least = dataclasses.replace(whole, heads=1, chunk=1)
    raise ValueError(_too_large(least))
  return min(fitting, key=lambda plan: plan.num_parts)


def cost(plan: Plan, columns: visits_lib.Visits) -> pl.CostEstimate | None:
  """The work of the tiles visited, a bound where they are not known."""
  sizes, (block_q, block_kv) = plan.sizes, plan.tiles
  if not exported.is_known(sizes.batch):
    return None
  num_pairs = sizes.batch * sizes.num_heads
  num_valid = columns.num_valid
  # Lists that heads or sequences share are walked by each of them.
  if isinstance(num_valid, np.ndarray):
    shared = math.prod(num_valid.shape[:2])
    visited = int(num_valid.sum()) * num_pairs // shared
  else:
    width = min(columns.table.shape[-1], plan.num_tiles)
    visited = num_pairs * plan.num_key_tiles * width
  logits = visited * block_q * block_kv
  queries = num_pairs * sizes.num_queries
  # Every part reads all keys and values, and adds to dK and dV in HBM.
  keys = sizes.batch * sizes.num_kv_heads * sizes.num_keys * sizes.head_dim
  out_itemsize = sizes.itemsize if plan.num_parts == 1 else 8
  return pl.CostEstimate(
      flops=10 * sizes.head_dim * logits,
      transcendentals=logits,
      bytes_accessed=queries * (3 * sizes.head_dim * sizes.itemsize + 8)
      + 2 * plan.num_parts * keys * (sizes.itemsize + out_itemsize),
  )


def _fits(plan: Plan) -> bool:
  return sum(plan.vmem().values()) <= plan.limit


def _idle_cores(plan: Plan) -> int:
  return 0 if plan.num_parts == 1 else plan.num_cores - plan.num_used_cores


def _too_large(least: Plan) -> str:
  need = least.vmem()
  terms = ", ".join(f"{n / _MIB:.2f} for {name}" for name, n in need.items())
  return (
      f"tiles of {least.tiles.block_q} queries and {least.tiles.block_kv} keys"
      f" with head_dim={least.sizes.head_dim} take"
      f" {sum(need.values()) / _MIB:.2f} MiB of VMEM in the backward pass"
      f" ({terms}), of which {least.limit / _MIB:.2f} MiB may be taken; make"
      " block_q or block_kv smaller"
  )
