"""Tiles of attention on a TPU: which to take, and whether they fit.

Everything here is arithmetic on what `pltpu.get_tpu_info` says of a chip, so
that a program can be made for a chip that is not there.
"""

import dataclasses
from typing import Literal

import jax
from jax.experimental import pallas as pl
import numpy as np

from kernels_pallas import masks
from kernels_pallas import selection as selection_lib
from kernels_pallas.attention import differentiable
from kernels_pallas.attention import visits as visits_lib
from kernels_pallas.attention.tpu import fetch
from kernels_pallas.attention.tpu import forward
from kernels_pallas.attention.tpu import memory
from kernels_pallas.attention.tpu.layout import Sizes
from kernels_pallas.attention.tpu.layout import Tiles
from kernels_pallas.hardware import tpu_layout
from kernels_pallas.hardware import tpu_tile
from kernels_pallas.transformations import exported

_MIB = 1 << 20
_LANES = tpu_layout.LANES
# Best first on long rows; smaller ones waste less on narrow masks.
_CANDIDATES = (
    (1024, 1024),
    (1024, 512),
    (512, 1024),
    (512, 512),
    (256, 1024),
    (256, 512),
    (256, 256),
    (128, 512),
    (128, 128),
)
_PLACES: tuple[fetch.Place, ...] = ("vmem", "vmem_once", "hbm")
# Bundles with column sums, of those without, as schedules of long rows show.
_STRIP_FACTOR, _TWO_PASS_FACTOR = 1.15, 1.55

# Queries of a selection's block that are worth a product: a tile's sublanes.
_MIN_BLOCK_Q = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionTpuConfig:
  """Choices for the TPU kernels; None is the heuristic's.

  Attributes:
    block_q: Queries of a tile; multiples of 128 waste nothing. A selection
      brings its own.
    block_kv: Keys of a tile, a multiple of 128. A selection brings its own.
    col_mass: "strip" sums columns in the forward pass itself, for which the
      logits of a whole row of tiles must fit into VMEM; "two_pass" makes the
      logits again.
    keys: Where keys and values are, see `fetch.Place`.
  """

  block_q: int | None = None
  block_kv: int | None = None
  col_mass: Literal["strip", "two_pass"] | None = None
  keys: fetch.Place | None = None


def tiles_of(
    config: AttentionTpuConfig,
    sizes: Sizes,
    where: differentiable.Where,
    emits_col_mass: bool,
) -> Tiles:
  """The tiles of a forward pass: a selection's own, or the cheapest that fit.

  Raises:
    ValueError: If `config` has tiles that a TPU or the selection cannot have.
  """
  check(config)
  if isinstance(where, selection_lib.Selection):
    return _selection_tiles(config, sizes, where)
  return _mask_tiles(config, sizes, where, emits_col_mass)


def backward_tiles(
    config: AttentionTpuConfig, sizes: Sizes, where: differentiable.Where
) -> Tiles:
  """The tiles of a backward pass, which sums no columns."""
  tiles = tiles_of(config, sizes, where, False)
  if isinstance(where, selection_lib.Selection):
    return tiles
  # Its products need more of VMEM than the forward pass, at most 512 x 512.
  return Tiles(min(tiles.block_q, 512), min(tiles.block_kv, 512))


def _mask_tiles(
    config: AttentionTpuConfig,
    sizes: Sizes,
    mask: masks.Mask | None,
    emits_col_mass: bool,
) -> Tiles:
  """Chooses the tiles of a dense attention: the cheapest of those that fit.

  Args:
    config: What it sets is kept.
    sizes: Of the attention.
    mask: Counts if it is known while tracing.
    emits_col_mass: Whether columns are summed: for less if whole rows of logits
      fit into VMEM, for which smaller tiles may be worth while.
  """
  is_known = mask is None or masks.numpy_of_mask(mask) is np
  costs: dict[Tiles, tuple[bool, float]] = {}
  # A traced mask may touch any tile, so that its cost is that of all.
  for block_q, block_kv in _CANDIDATES:
    tiles = Tiles(
        min(config.block_q or block_q, memory.round_up(sizes.num_queries)),
        min(config.block_kv or block_kv, memory.round_up(sizes.num_keys)),
    )
    if tiles in costs:
      continue
    states = np.asarray(
        visits_lib.states_of(mask if is_known else None, *sizes[3:5], *tiles)
    )
    width = int((states > 0).sum(axis=-1).max(initial=0))
    # Tiles that do not fit come last, whatever they would cost.
    factor = _cost_factor(config, sizes, tiles, width, emits_col_mass)
    costs[tiles] = factor is None, _bundles(states, tiles) * (factor or 1.0)
  return min(costs, key=lambda tiles: costs[tiles])


def _cost_factor(
    config: AttentionTpuConfig,
    sizes: Sizes,
    tiles: Tiles,
    width: int,
    emits_col_mass: bool,
) -> float | None:
  """Cost of these tiles, of that without column sums; None: they do not fit."""
  if emits_col_mass and config.col_mass != "two_pass":
    if _fit(config, sizes, tiles, width, width, True) is not None:
      return _STRIP_FACTOR
    if config.col_mass == "strip":
      return None
  if _fit(config, sizes, tiles, min(width, 2), width, False) is None:
    return None
  return _TWO_PASS_FACTOR if emits_col_mass else 1.0


def check(config: object) -> None:
  """Raises ValueError unless it is a AttentionTpuConfig that a TPU can tile."""
  if not isinstance(config, AttentionTpuConfig):
    raise ValueError(
        f"config is a {type(config).__name__}; the TPU kernels take a"
        " kernels_pallas.attention.tpu.plan.AttentionTpuConfig"
    )
  if config.block_q is not None and config.block_q < 1:
    raise ValueError(f"block_q={config.block_q} must be at least 1")
  tpu_layout.check_lanes("block_kv", config.block_kv)


def why_not(
    query: jax.Array | jax.ShapeDtypeStruct,
    where: differentiable.Where = None,
) -> str | None:
  """Says why tiles of a selection are none for a TPU; None if they are.

  Args:
    query: Any; asked for by all platforms alike.
    where: A mask is tiled in any case.
  """
  del query
  if not isinstance(where, selection_lib.Selection):
    return None
  if where.block_q < _MIN_BLOCK_Q:
    return (
        f"of the {_LANES} rows of each product selection.block_q="
        f"{where.block_q} would fill as many"
    )
  if where.block_kv % _LANES == 0:
    return None
  return f"selection.block_kv={where.block_kv} is no multiple of {_LANES} lanes"


def _selection_tiles(
    config: AttentionTpuConfig, sizes: Sizes, selection: selection_lib.Selection
) -> Tiles:
  """The tiles of a selection.

  Raises:
    ValueError: If a TPU cannot tile keys like that, or `config` wants others.
  """
  for name in ("block_q", "block_kv"):
    asked, given = getattr(config, name), getattr(selection, name)
    if asked is not None and asked != given:
      raise ValueError(
          f"config.{name}={asked}, but the selection has {name}={given}; leave"
          " it None"
      )
  block_kv = selection.block_kv
  if block_kv % _LANES and block_kv < sizes.num_keys:
    raise ValueError(
        f"selection.block_kv={block_kv} must be a multiple of the {_LANES}"
        f" lanes of a TPU, such as {memory.round_up(block_kv)}, or at least the"
        f" {sizes.num_keys} keys"
    )
  if block_kv >= sizes.num_keys:
    block_kv = memory.round_up(sizes.num_keys)
  return Tiles(selection.block_q, block_kv)


def forward_plan(
    config: AttentionTpuConfig,
    sizes: Sizes,
    tiles: Tiles,
    rows: visits_lib.Visits,
    logits: tpu_tile.Logits,
    emits_col_mass: bool,
) -> forward.Plan | None:
  """Plans `forward`; None if column sums need a second pass.

  Raises:
    ValueError: If the tiles do not fit into VMEM.
  """
  width = rows.table.shape[-1]
  is_strip = emits_col_mass and config.col_mass != "two_pass"
  if emits_col_mass and not is_strip:
    return None
  # Column sums need the logits of the whole row at once; without them a chunk
  # of two tiles is tried first, and one where nothing more fits.
  least = width if emits_col_mass else min(width, 2)
  found = _fit(config, sizes, tiles, least, width, emits_col_mass)
  if found is None and emits_col_mass and config.col_mass is None:
    return None
  if found is None and not emits_col_mass:
    found = _fit(config, sizes, tiles, 1, width, emits_col_mass)
  if found is None:
    chunk, place = width if is_strip else 1, config.keys or "hbm"
    need = memory.forward_vmem(sizes, tiles, chunk, place, is_strip)
    advice = " or col_mass='two_pass'" if is_strip else ""
    raise ValueError(memory.too_large(tiles, need) + advice)
  memory.check_smem(width, tiles)
  place, chunk = found
  plan = _plan(sizes, tiles, logits, rows, place, num_products=4)
  return dataclasses.replace(plan, chunk=chunk, emits_col_mass=emits_col_mass)


def col_mass_plan(
    config: AttentionTpuConfig,
    sizes: Sizes,
    tiles: Tiles,
    columns: visits_lib.Visits,
    logits: tpu_tile.Logits,
) -> forward.Plan:
  """Plans `col_mass`.

  Raises:
    ValueError: If the tiles do not fit into VMEM.
  """
  places = _PLACES if config.keys is None else (config.keys,)
  needs = {place: memory.col_mass_vmem(sizes, tiles, place) for place in places}
  fitting = [
      p for p, need in needs.items() if sum(need.values()) <= memory.limit()
  ]
  if not fitting:
    raise ValueError(
        memory.too_large(tiles, needs[places[-1]]) + " or fewer queries"
    )
  place = fitting[0]
  memory.check_smem(columns.table.shape[-1], tiles)
  return _plan(sizes, tiles, logits, columns, place, num_products=2)


def _plan(
    sizes: Sizes,
    tiles: Tiles,
    logits: tpu_tile.Logits,
    visits: visits_lib.Visits,
    place: fetch.Place,
    num_products: int,
) -> forward.Plan:
  """Of sums of columns, a tile at a time."""
  return forward.Plan(
      tiles=tiles,
      logits=logits,
      chunk=1,
      keys=place,
      is_masked=_has_partial(visits),
      emits_col_mass=True,
      vmem_limit_bytes=memory.limit(),
      cost=_cost(sizes, tiles, visits, num_products, place),
  )


def _fit(
    config: AttentionTpuConfig,
    sizes: Sizes,
    tiles: Tiles,
    least: int,
    most: int,
    emits_col_mass: bool,
) -> tuple[fetch.Place, int] | None:
  """Where keys go and how many tiles of logits fit beside them, or None."""
  for place in _PLACES if config.keys is None else (config.keys,):
    need = memory.forward_vmem(sizes, tiles, 0, place, emits_col_mass)
    room = (memory.limit() - sum(need.values())) // (4 * tiles.area)
    if room >= max(least, 1):
      return place, max(min(room, most), 1)
  return None


def _has_partial(rows: visits_lib.Visits) -> bool:
  if isinstance(rows.num_full, np.ndarray):
    return bool((rows.num_full < rows.num_valid).any())
  return True


def _bundles(states: np.ndarray, tiles: Tiles) -> float:
  """Cycles of a head on a v5e, from static schedules of a few tiles.

  A tile of area a takes 302 + 860 a / 512^2, another 110 a / 512^2 if it is
  masked; a row takes 150 and 0.63 a query.
  """
  area = tiles.area / 512**2
  full = (states == selection_lib.FULL).sum() / states.shape[0]
  partial = (states == selection_lib.PARTIAL).sum() / states.shape[0]
  row = 150 + 0.63 * tiles.lanes_q
  return (
      (full + partial) * (302 + 860 * area)
      + partial * 110 * area
      + states.shape[-2] * row
  )


def _cost(
    sizes: Sizes,
    tiles: Tiles,
    rows: visits_lib.Visits,
    flops: int,
    place: fetch.Place,
) -> pl.CostEstimate | None:
  """Of the tiles that are visited, if known while tracing, else of the bound.

  Args:
    sizes: Of the attention.
    tiles: Queries and keys of a tile.
    rows: Lists of tiles.
    flops: Per query, key and element of head_dim.
    place: Streamed keys are read once per visit.
  """
  if not exported.is_known(sizes.batch):
    return None
  heads = sizes.batch * sizes.num_heads
  if isinstance(rows.num_valid, np.ndarray):
    visits = float(rows.num_valid.mean()) * rows.num_valid.shape[2]
  else:
    visits = float(np.prod(rows.table.shape[2:]))
  pairs = round(visits * heads * tiles.area)
  row = sizes.head_dim * sizes.itemsize
  moved = 2 * heads * sizes.num_queries * row
  if place == "hbm":
    moved += round(visits * heads * tiles.block_kv * 2 * row)
  else:
    moved += 2 * sizes.batch * sizes.num_kv_heads * sizes.num_keys * row
  return pl.CostEstimate(
      flops=flops * pairs * sizes.head_dim,
      bytes_accessed=moved + 4 * heads * (sizes.num_queries + sizes.num_keys),
      transcendentals=pairs,
  )
