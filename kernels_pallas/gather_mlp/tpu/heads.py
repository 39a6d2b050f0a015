"""Projections into and out of chosen heads on a TPU: a kernel each.

As the MLP: a head [H, D] is a slab, copied one ahead of its use.
"""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas import interpret
from kernels_pallas.gather_mlp import parts
from kernels_pallas.gather_mlp.tpu import config as tpu_config
from kernels_pallas.gather_mlp.tpu import stream as tpu_stream
from kernels_pallas.hardware import tpu_layout
from kernels_pallas.hardware import tpu_tile
from kernels_pallas.hardware import types as hw_types
from kernels_pallas.transformations import exported
from kernels_pallas.transformations import manual_axes

_LAST_BY_LAST = (((1,), (1,)), ((), ()))
_LAST_BY_FIRST = (((1,), (0,)), ((), ()))


def into_heads(
    given: parts.GivenHeads, config: tpu_config.Config | None = None
) -> Float[Array, "B U H"]:
  """As `reference.into_heads`, 0 past the number of the plan.

  Raises:
    ValueError: If a TPU has no such type, or nothing fits into VMEM.
  """
  x, kernel, plan = given
  out = _run(x[None], kernel, plan, config, is_into=True)
  return jnp.swapaxes(out, 0, 1)[: x.shape[0]]


def out_of_heads(
    given: parts.GivenHeads, config: tpu_config.Config | None = None
) -> Float[Array, "B D"]:
  """As `reference.out_of_heads`.

  Raises:
    ValueError: As `into_heads`.
  """
  heads, kernel, plan = given
  by_head = jnp.swapaxes(heads, 0, 1)
  out = _run(by_head, kernel, plan, config, is_into=False)
  return out[0, : heads.shape[0]]


def _run(
    given: jax.Array,
    kernel: jax.Array,
    plan: parts.Plan,
    config: tpu_config.Config | None,
    is_into: bool,
) -> jax.Array:
  """From [1, B, D] to [U, B, H], or from [U, B, H] to [1, B, D]."""
  num_cores = tpu_layout.tpu_info().num_cores
  _, size, width = kernel.shape
  num_entries, batch = plan.blocks.shape[0], given.shape[1]
  tile = _tile(config, given, num_entries, kernel.shape)
  # Padded sequences are computed and cut off: their rows touch no others.
  given = jnp.pad(given, ((0, 0), (0, -batch % tile), (0, 0)))
  made = (num_entries, given.shape[1], size)
  made = made if is_into else (1, given.shape[1], width)
  num_tiles = given.shape[1] // tile
  bytes_of = lambda x: x.dtype.itemsize * x.size
  chosen = num_entries * size * width
  out = pl.pallas_call(
      functools.partial(_kernel, num_cores, is_into),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=1,
          grid=(num_cores, num_tiles),
          in_specs=[
              pl.BlockSpec(
                  (given.shape[0], tile, given.shape[2]),
                  lambda core, tile, *_: (0, tile, 0),
              ),
              pl.BlockSpec(memory_space=pl.ANY),
          ],
          out_specs=pl.BlockSpec(
              (1, made[0], tile, made[2]),
              lambda core, tile, *_: (core, 0, tile, 0),
          ),
          scratch_shapes=tpu_stream.scratch([kernel], size),
      ),
      out_shape=manual_axes.struct((num_cores, *made), jnp.float32),
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel", "arbitrary"),
          vmem_limit_bytes=tpu_config.limit(),
      ),
      cost_estimate=exported.estimate(
          flops=2 * given.shape[1] * chosen,
          bytes_accessed=kernel.dtype.itemsize * chosen * num_tiles
          + bytes_of(given)
          + 4 * made[0] * made[1] * made[2],
          transcendentals=0,
      ),
      interpret=interpret.mode(),
      name="into_heads" if is_into else "out_of_heads",
  )(tpu_stream.table_of(plan), given, kernel)
  return out.sum(axis=0)


def _kernel(
    num_cores: int,
    is_into: bool,
    table: hw_types.Ref,
    given: hw_types.Ref,
    kernel: hw_types.Ref,
    out: hw_types.Ref,
    *scratch: hw_types.Ref,
) -> None:
  buffer, semaphores = scratch
  out[...] = jnp.zeros_like(out)
  stream = tpu_stream.Stream(
      table, 1, num_cores, [kernel], None, [buffer], semaphores
  )

  def see(visit: tpu_stream.Visit, slabs: list[jax.Array]) -> None:
    if is_into:
      out[0, visit.entry] = tpu_tile.multiply(given[0], slabs[0], _LAST_BY_LAST)
    else:
      part = given[visit.entry]
      out[0, 0] += tpu_tile.multiply(part, slabs[0], _LAST_BY_FIRST)

  stream.walk(see)


def _tile(
    config: tpu_config.Config | None,
    given: jax.Array,
    num_entries: int,
    shape: tuple[int, ...],
) -> int:
  """Sequences that share a pass over the heads.

  Raises:
    ValueError: If they do not fit.
  """
  _, size, width = shape
  sizes = tpu_config.Sizes(
      batch=given.shape[1],
      width=width,
      block_size=size,
      num_entries=num_entries,
      num_neurons=size,
      num_matrices=1,
      dtype=given.dtype,
      has_members=False,
      num_biases=0,
  )
  lanes = tpu_layout.round_up(size, tpu_layout.LANES)

  def need_of(batch: int) -> dict[str, int]:
    need = tpu_config.vmem(tpu_config.Tiles(size, batch), sizes, False)
    # One copy is being made or read while the other is at work.
    return need | {"heads": 2 * 4 * num_entries * batch * lanes}

  return tpu_config.first_that_fits(
      tpu_config.batches(config or tpu_config.Config(), sizes),
      need_of,
      lambda batch: f"{num_entries} heads of {size} and {batch} sequences",
  )
