"""Attention on a GPU by the kernels of this package, forward and backward.

Brings the arguments of an implementation (see `attention.differentiable`) into
the form of the kernels: head sizes of 64 or 128, a positive scale, and a list
of tiles for each tile, from a mask or from a selection.
"""

from collections.abc import Callable
import dataclasses
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from kernels_pallas import interpret
from kernels_pallas import masks
from kernels_pallas import selection as selection_lib
from kernels_pallas.attention import differentiable
from kernels_pallas.attention import visits as visits_lib
from kernels_pallas.attention.gpu import backward_kv as gpu_backward_kv
from kernels_pallas.attention.gpu import backward_q as gpu_backward_q
from kernels_pallas.attention.gpu import col_mass as gpu_col_mass
from kernels_pallas.attention.gpu import forward as gpu_forward
from kernels_pallas.hardware import gpu_layout

_HEAD_DIMS = (64, 128)
_SMALLEST_TILE = gpu_layout.ROWS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Tiles of the kernels; None takes what `choose` of the kernel says.

  Attributes:
    forward: Of out and lse.
    col_mass: Of what each key gets.
    backward_kv: Of the gradients by key and value.
    backward_q: Of the gradient by query.
  """

  forward: gpu_layout.Config | None = None
  col_mass: gpu_layout.Config | None = None
  backward_kv: gpu_layout.Config | None = None
  backward_q: gpu_layout.Config | None = None


class _Call(NamedTuple):
  """Query, key and value as the kernels take them, and what undoes that."""

  query: jax.Array
  key: jax.Array
  value: jax.Array
  sign: float
  options: dict[str, Any]


def why_not(
    query: Any, where: differentiable.Where = None, *, any_device: bool = False
) -> str | None:
  """Says why the kernels cannot compute this, None if they can.

  Args:
    query: Array or its abstract value [B, T, N, H].
    where: What may be attended to.
    any_device: Whether to leave out what the device is, as where programs are
      compiled for another one.
  """
  if jax.__version_info__ < (0, 11):
    return f"pallas_gpu needs jax >= 0.11, this is {jax.__version__}"
  if query.dtype not in (jnp.bfloat16, jnp.float16):
    return (
        "pallas_gpu computes bfloat16 and float16, not"
        f" {query.dtype}; use implementation='xla' for float32"
    )
  if query.shape[-1] > _HEAD_DIMS[-1]:
    return f"pallas_gpu has heads of up to 128, not of {query.shape[-1]}"
  if isinstance(where, selection_lib.Selection):
    for name in ("block_q", "block_kv"):
      if getattr(where, name) % _SMALLEST_TILE:
        return (
            f"pallas_gpu needs {name} to be a multiple of {_SMALLEST_TILE}, not"
            f" {getattr(where, name)}"
        )
  if any_device or interpret.mode() or is_hopper():
    return None
  return "pallas_gpu needs a Hopper GPU (H100, H200, GH200)"


def is_hopper() -> bool:
  """Whether programs are traced for a Hopper GPU, there or described."""
  mesh = jax.sharding.get_abstract_mesh()
  device = getattr(mesh, "abstract_device", None) or jax.devices()[0]
  return re.search(r"\bG?H\d+", device.device_kind) is not None


def forward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    where: differentiable.Where,
    sink_logits: Float[Array, "N"] | None,
    spec: differentiable.AttentionSpec,
    config: Config,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
  """Computes out and lse.

  Raises:
    ValueError: If the kernels do not have the type, head or block size.
  """
  call = _call(query, key, value, where, spec)
  tiles = config.forward or _choose(gpu_forward.choose, call, where)
  out, lse = gpu_forward.forward(
      call.query,
      call.key,
      call.value,
      _mask_of(where),
      _visits(visits_lib.by_query, call, where, tiles),
      sink_logits,
      config=tiles,
      **call.options,
  )
  return out[..., : query.shape[-1]], lse


def col_mass(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    lse: Float[Array, "B N T"],
    where: differentiable.Where,
    row_weights: Float[Array, "B N T"] | None,
    spec: differentiable.AttentionSpec,
    config: Config,
) -> Float[Array, "B N S"]:
  """Sums what each key gets; arguments and errors as `forward`."""
  call = _call(query, key, key, where, spec)
  tiles = config.col_mass or _choose(gpu_col_mass.choose, call, where)
  return gpu_col_mass.col_mass(
      call.query,
      call.key,
      jax.lax.stop_gradient(lse),
      row_weights,
      _mask_of(where),
      _visits(visits_lib.by_key, call, where, tiles),
      config=tiles,
      **call.options,
  )


def backward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    where: differentiable.Where,
    lse: Float[Array, "B N T"],
    delta: Float[Array, "B N T"],
    d_out: Float[Array, "B T N H"],
    spec: differentiable.AttentionSpec,
    config: Config,
) -> tuple[
    Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]
]:
  """Computes the cotangents of query, key and value; errors as `forward`."""
  call = _call(query, key, value, where, spec)
  d_out = _pad_head(d_out.astype(query.dtype))
  arrays = (call.query, call.key, call.value, d_out, lse, delta)
  mask = _mask_of(where)
  tiles_q = config.backward_q or _choose(gpu_backward_q.choose, call, where)
  tiles_kv = config.backward_kv or _choose(gpu_backward_kv.choose, call, where)
  d_query = gpu_backward_q.backward_q(
      *arrays,
      mask,
      _visits(visits_lib.by_query, call, where, tiles_q),
      config=tiles_q,
      **call.options,
  )
  d_key, d_value = gpu_backward_kv.backward_kv(
      *arrays,
      mask,
      _visits(visits_lib.by_key, call, where, tiles_kv),
      config=tiles_kv,
      **call.options,
  )
  head_dim = query.shape[-1]
  d_query = d_query * call.sign if call.sign != 1 else d_query
  return (
      d_query[..., :head_dim],
      d_key[..., :head_dim],
      d_value[..., :head_dim],
  )


def refine(
    selection: selection_lib.Selection,
    num_queries: int,
    block_q: int,
    block_kv: int,
) -> selection_lib.Selection:
  """The same selection in smaller blocks, which divide its own."""
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


def _call(
    query: Any,
    key: Any,
    value: Any,
    where: differentiable.Where,
    spec: differentiable.AttentionSpec,
) -> _Call:
  """Checks and prepares; raises ValueError."""
  reason = why_not(query, where, any_device=True)
  if reason is not None and jax.__version_info__ >= (0, 11):
    raise ValueError(reason)
  # 2^x of a masked logit is 0 for positive factors alone, and exact: +-1, 0.
  sign = float(np.sign(spec.scale))
  query = query if sign == 1 else query * sign
  return _Call(
      _pad_head(query),
      _pad_head(key),
      _pad_head(value),
      sign,
      {"scale": abs(spec.scale) or 1.0, "soft_cap": spec.logits_soft_cap},
  )


def _pad_head(array: jax.Array) -> jax.Array:
  """Pads the last axis to a size that the kernels have."""
  size = next(size for size in _HEAD_DIMS if size >= array.shape[-1])
  if size == array.shape[-1]:
    return array
  return jnp.pad(array, [(0, 0)] * 3 + [(0, size - array.shape[-1])])


def _choose(
    choose: Callable[..., gpu_layout.Config],
    call: _Call,
    where: differentiable.Where,
) -> gpu_layout.Config:
  """The heuristic's tiles, which divide a selection's blocks."""
  head_dim, mask = call.query.shape[-1], _mask_of(where)
  has_ids = mask is not None and mask.query_ids is not None
  if isinstance(where, selection_lib.Selection):
    return choose(head_dim, has_ids, where.block_q, where.block_kv)
  return choose(head_dim, has_ids)


def _mask_of(where: differentiable.Where) -> masks.Mask | None:
  return where.mask if isinstance(where, selection_lib.Selection) else where


def _visits(
    by: Callable[..., visits_lib.Visits],
    call: _Call,
    where: differentiable.Where,
    tiles: gpu_layout.Config,
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
