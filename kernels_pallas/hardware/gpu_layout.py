"""What the GPU kernels share: tiles, memory, masks, and how they are launched.

All kernels have one form. A block of threads keeps tiles of one side (64 rows
for each of its consumer warpgroups) and streams tiles of the other side through
a ring of shared memory, in the order of a `Visits` list; one more warpgroup
does nothing but order the copies. Mosaic GPU, for Hopper.

Letters: B batch, T queries, S keys, N query heads, K key heads, H head size.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, NamedTuple

import jax
from jax.experimental.pallas import mosaic_gpu
import jax.numpy as jnp
import numpy as np

from kernels_pallas import interpret
from kernels_pallas import masks
from kernels_pallas.hardware import gpu_math
from kernels_pallas.hardware import types as hw_types

# Its names differ between versions of jax; `launch` says which it needs.
plgpu: Any = mosaic_gpu

# Rows that a warpgroup's matrix instruction has.
ROWS = 64
# Shared memory that a block may ask for on Hopper.
MAX_SMEM_BYTES = 232_448
# Barriers, and what aligning small buffers loses.
SMEM_RESERVE_BYTES = 2560


@dataclasses.dataclass(frozen=True, kw_only=True)
class TileConfig:
  """Tiles of one kernel.

  Attributes:
    block_q: Queries in a tile, 64 or 128.
    block_kv: Keys in a tile, 64 or 128.
    num_stages: Streamed tiles that are in shared memory at once.
    is_alternating: Whether the two consumer warpgroups take turns, so that one
      multiplies while the other exponentiates. Forward only.
  """

  block_q: int = 128
  block_kv: int = 128
  num_stages: int = 2
  is_alternating: bool = True

  def __post_init__(self):
    for name in ("block_q", "block_kv"):
      size = getattr(self, name)
      if size not in (ROWS, 2 * ROWS):
        raise ValueError(f"{name}={size} must be {ROWS} or {2 * ROWS}")
    if self.num_stages < 1:
      raise ValueError(f"num_stages={self.num_stages} must be at least 1")


class Spans(NamedTuple):
  """A mask, padded to whole tiles; see `masks.Mask`. Batch may be 1.

  Attributes:
    starts: int32 [B, P, T].
    stops: int32 [B, P, T]; 0 for padding: no query attends to anything there.
    query_ids: int32 [B, T] or None.
    key_ids: int32 [B, S] or None.
  """

  starts: masks.AnyArray
  stops: masks.AnyArray
  query_ids: masks.AnyArray | None
  key_ids: masks.AnyArray | None


def spans_of(
    mask: masks.Mask | None,
    num_queries: int,
    num_keys: int,
    config: TileConfig,
) -> Spans:
  """Brings a mask into the form that the kernels read."""
  if mask is None:
    mask = masks.full(num_queries, num_keys)
  # Past the last key there is none, whatever a mask of padded lengths says.
  xp = masks.numpy_of_mask(mask)
  stops = xp.minimum(mask.stops, num_keys)
  pad_q = -num_queries % config.block_q
  pad_kv = -num_keys % config.block_kv
  pad = lambda ids, size: None if ids is None else _pad_last(ids, size, 2)
  return Spans(
      _pad_last(mask.starts, pad_q, 3),
      _pad_last(stops, pad_q, 3),
      pad(mask.query_ids, pad_q),
      pad(mask.key_ids, pad_kv),
  )


def pad_rows(rows: jax.Array, block: int, value: float) -> jax.Array:
  """Pads [B, N, T] to whole tiles."""
  padding = -rows.shape[-1] % block
  return jnp.pad(rows, ((0, 0), (0, 0), (0, padding)), constant_values=value)


def log2_lse(lse: jax.Array, block_q: int) -> jax.Array:
  """Returns lse in units of log 2, inf for rows without keys and padding.

  2^(logit - inf) = 0, whatever the logit: such rows give no weight.
  """
  lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse * gpu_math.LOG2_E)
  return pad_rows(lse, block_q, jnp.inf)


def check_smem(what: str, num_bytes: int, config: object) -> None:
  """Raises ValueError if a kernel's buffers cannot be in shared memory."""
  total = num_bytes + SMEM_RESERVE_BYTES
  if total > MAX_SMEM_BYTES:
    raise ValueError(
        f"{what} with {config} needs {num_bytes} bytes of shared memory and"
        f" {SMEM_RESERVE_BYTES} more for barriers; a block has"
        f" {MAX_SMEM_BYTES}. Take fewer stages or smaller tiles"
    )


def tile_buffer(
    num_tiles: int, rows: int, head_dim: int, dtype: jax.typing.DTypeLike
) -> hw_types.Buffer:
  """Shared memory of tiles that TMA writes and wgmma reads."""
  # Rows of 128 bytes are swizzled over the banks, as wgmma wants its operands.
  transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
  return plgpu.SMEM((num_tiles, rows, head_dim), dtype, transforms=transforms)


def launch(
    body: Callable[[Mapping[str, Any], Mapping[str, Any]], None],
    name: str,
    inputs: Mapping[str, Any],
    outputs: Mapping[str, jax.ShapeDtypeStruct],
    scratch: Mapping[str, Any],
    grid: Mapping[str, int],
    num_consumers: int,
) -> dict[str, jax.Array]:
  """Runs a kernel of `num_consumers` warpgroups and one that orders copies.

  Args:
    body: Takes the references of inputs and outputs, and of scratch, by name.
    name: Of the kernel, in profiles and dumps.
    inputs: Arrays in global memory; None ones are left out.
    outputs: What to make.
    scratch: Shared memory and barriers.
    grid: Names and sizes; blocks next to each other differ in the last name.
    num_consumers: Warpgroups that compute; axis "warpgroup" is one longer.

  Raises:
    ImportError: If jax is too old.
  """
  require_jax()
  inputs = {name: x for name, x in inputs.items() if x is not None}
  # Pallas gives references by position; bodies take them by name.
  names = (*inputs, *outputs)

  def kernel(*refs: hw_types.Ref, **scratch_refs: hw_types.Ref):
    body(dict(zip(names, refs, strict=True)), scratch_refs)

  mode = interpret.mode()
  kernel.__name__ = name
  results = plgpu.kernel(
      kernel,
      out_type=tuple(outputs.values()),
      scratch_types=dict(scratch),
      grid=tuple(grid.values()),
      grid_names=tuple(grid),
      num_threads=num_consumers + 1,
      thread_name="warpgroup",
      compiler_params=plgpu.CompilerParams(
          approx_math=True, reduction_scratch_bytes=0
      ),
      interpret=plgpu.InterpretGPUParams() if mode is True else mode or None,
  )(*(jnp.asarray(x) for x in inputs.values()))
  return dict(zip(outputs, results, strict=True))


def require_jax() -> None:
  """Raises ImportError where jax has no Mosaic GPU kernels as used here."""
  if jax.__version_info__ < (0, 11):
    raise ImportError(
        f"pallas_gpu needs jax >= 0.11, this is {jax.__version__}; use"
        " implementation='xla'"
    )


def _pad_last(array: masks.AnyArray, padding: int, ndim: int) -> masks.AnyArray:
  """Pads the last axis by zeros, after adding leading axes up to `ndim`."""
  array = masks.to_rank(array, ndim)
  xp = np if isinstance(array, np.ndarray) else jnp
  return xp.pad(array, [(0, 0)] * (ndim - 1) + [(0, padding)])
