"""Tiles of attention on a GPU: what the kernels can compute, and their lists.

Brings the arguments of an implementation (see `attention.differentiable`) into
the form of the kernels: head sizes of 64 or 128, a positive scale, and a list
of tiles for each tile, from a mask or from a selection.
"""

from collections.abc import Callable
import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import masks
from kernels_pallas import selection as selection_lib
from kernels_pallas.attention import differentiable
from kernels_pallas.attention import visits as visits_lib
from kernels_pallas.attention.gpu import task as task_lib
from kernels_pallas.hardware import gpu_chip
from kernels_pallas.hardware import gpu_layout

_HEAD_DIMS = (64, 128)
_SMALLEST_TILE = gpu_layout.ROWS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
  """Tiles of the kernels; None takes what `choose` of the kernel says.

  Attributes:
    forward: Of out and lse.
    col_mass: Of what each key gets.
    backward_kv: Of the gradients by key and value.
    backward_q: Of the gradient by query.
  """

  forward: gpu_layout.TileConfig | None = None
  col_mass: gpu_layout.TileConfig | None = None
  backward_kv: gpu_layout.TileConfig | None = None
  backward_q: gpu_layout.TileConfig | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionGpuConfig:
  """How an attention is computed.

  Attributes:
    forward_by: "mosaic" is our kernel; "cudnn" is NVIDIA's, which has no sinks,
      no soft cap, no selection, and of masks causal and causal windows over
      T = S.
    tiles: Of our kernels.
  """

  forward_by: Literal["mosaic", "cudnn"] = "mosaic"
  tiles: Tiles = Tiles()


class Call(NamedTuple):
  """Query, key and value as the kernels take them, and what undoes that."""

  query: jax.Array
  key: jax.Array
  value: jax.Array
  sign: float
  scale: float
  soft_cap: float | None


def why_not(
    query: jax.Array | jax.ShapeDtypeStruct,
    where: differentiable.Where = None,
    *,
    any_device: bool = False,
) -> str | None:
  """Says why the kernels cannot compute this, None if they can.

  Args:
    query: Array or its abstract value [B, T, N, H].
    where: What may be attended to.
    any_device: Whether to leave out what the device is, as where programs are
      compiled for another one.
  """
  reason = gpu_chip.why_not_type(query.dtype)
  if reason is not None:
    return reason
  if query.shape[-1] > _HEAD_DIMS[-1]:
    return f"pallas_gpu has heads of up to 128, not of {query.shape[-1]}"
  if isinstance(where, selection_lib.Selection):
    for name in ("block_q", "block_kv"):
      if getattr(where, name) % _SMALLEST_TILE:
        return (
            f"pallas_gpu needs {name} to be a multiple of {_SMALLEST_TILE}, not"
            f" {getattr(where, name)}"
        )
  return None if any_device else gpu_chip.why_not_here()


def prepare(
    arrays: differentiable.Inputs | differentiable.Saved,
    spec: differentiable.AttentionSpec,
) -> Call:
  """Checks and pads what all kernels read.

  Raises:
    ValueError: If the kernels do not have the type, head or block size.
  """
  query, key, value, where = arrays[:4]
  reason = why_not(query, where, any_device=True)
  if reason is not None and jax.__version_info__ >= (0, 11):
    raise ValueError(reason)
  # 2^x of a masked logit is 0 for positive factors alone, and exact: +-1, 0.
  sign = float(np.sign(spec.scale))
  query = query if sign == 1 else query * sign
  return Call(
      pad_head(query),
      pad_head(key),
      pad_head(value),
      sign,
      abs(spec.scale) or 1.0,
      spec.logits_soft_cap,
  )


def pad_head(array: jax.Array) -> jax.Array:
  """Pads the last axis to a size that the kernels have."""
  size = next(size for size in _HEAD_DIMS if size >= array.shape[-1])
  if size == array.shape[-1]:
    return array
  return jnp.pad(array, [(0, 0)] * 3 + [(0, size - array.shape[-1])])


def task_of(
    asked: gpu_layout.TileConfig | None,
    choose: Callable[[task_lib.Limits], gpu_layout.TileConfig],
    by: Callable[..., visits_lib.Visits],
    call: Call,
    where: differentiable.Where,
) -> task_lib.Task:
  """The lists and tiles of one kernel.

  Args:
    asked: The user's tiles; None takes those of `choose`.
    choose: The kernel's heuristic, whose tiles divide a selection's blocks.
    by: `visits.by_query` or `visits.by_key`: which side stays.
    call: What the kernel reads.
    where: What may be attended to.

  Raises:
    ValueError: If the tiles do not divide a selection's blocks.
  """
  mask = mask_of(where)
  # Ids take registers, so that other tiles fit.
  has_ids = mask is not None and mask.query_ids is not None
  limits = task_lib.Limits(call.query.shape[-1], has_ids)
  if isinstance(where, selection_lib.Selection):
    limits = limits._replace(most_q=where.block_q, most_kv=where.block_kv)
  config = asked or choose(limits)
  visits = visits_of(by, call, where, config)
  return task_lib.Task(mask, visits, call.scale, call.soft_cap, config)


def mask_of(where: differentiable.Where) -> masks.Mask | None:
  """The mask inside the tiles."""
  return where.mask if isinstance(where, selection_lib.Selection) else where


def visits_of(
    by: Callable[..., visits_lib.Visits],
    call: Call,
    where: differentiable.Where,
    tiles: gpu_layout.TileConfig,
) -> visits_lib.Visits:
  """The lists of one kernel."""
  num_queries, num_keys = call.query.shape[1], call.key.shape[1]
  sizes = (tiles.block_q, tiles.block_kv)
  if isinstance(where, selection_lib.Selection):
    if where.block_q % sizes[0] or where.block_kv % sizes[1]:
      raise ValueError(
          f"tiles of {sizes} must divide the selection's blocks of"
          f" {(where.block_q, where.block_kv)}"
      )
    where = refine(where, num_queries, *sizes)
  states = visits_lib.states_of(where, num_queries, num_keys, *sizes)
  width = visits_lib.width_of(where) if by is visits_lib.by_query else None
  return by(states, width)


def refine(
    selection: selection_lib.Selection,
    num_queries: int,
    block_q: int,
    block_kv: int,
) -> selection_lib.Selection:
  """The same selection in smaller blocks, which divide its own."""
  # A kernel's tiles are 64 or 128 and divide the blocks: each entry of the
  # table becomes as many, next to each other.
  split_q = selection.block_q // block_q
  split_kv = selection.block_kv // block_kv
  xp = np if isinstance(selection.block_table, np.ndarray) else jnp
  num_rows = -(-num_queries // block_q)
  rows = lambda x: xp.repeat(x, split_q, axis=2)[:, :, :num_rows]
  parts = masks.to_rank(xp.arange(split_kv, dtype=xp.int32), 5)
  table = rows(selection.block_table)[..., None] * split_kv + parts
  return selection_lib.Selection(
      table.reshape(*table.shape[:3], -1),
      rows(selection.num_valid) * split_kv,
      selection.mask,
      block_q,
      block_kv,
  )
