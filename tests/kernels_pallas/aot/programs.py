"""Small kernels of known schedules, and planted defects, for the tests here.

Each function returns (fn, args), as a job's program does.
"""

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

_F32 = jnp.float32


def add_rows(rows=256, cols=256, block=128):
  """x + 1 in blocks of rows: four blocks are in VMEM at once."""

  def kernel(x, out):
    out[...] = x[...] + 1

  spec = pl.BlockSpec((block, cols), lambda i: (i, 0))
  call = pl.pallas_call(
      kernel,
      grid=(rows // block,),
      in_specs=[spec],
      out_specs=spec,
      out_shape=jax.ShapeDtypeStruct((rows, cols), _F32),
      name="add_rows",
  )
  return call, (jax.ShapeDtypeStruct((rows, cols), _F32),)


def matmul(size=512, block=256, num_loops=4):
  """x @ y over a grid (i, k): init and flush at ends of k, two inner loops.

  Code, in order: the grid loop; in it a branch at k = 0, a loop of `num_loops`
  products, a loop of k products with a guard, a branch at the last k.
  """
  num = size // block

  def kernel(x, y, out, acc):
    k = pl.program_id(1)

    @pl.when(k == 0)
    def _init():
      acc[...] = jnp.zeros_like(acc)

    def step(j, _):
      part = jnp.dot(x[...], y[...], preferred_element_type=_F32)
      acc[...] += part * j.astype(_F32)

    jax.lax.fori_loop(0, num_loops, step, None)
    jax.lax.fori_loop(0, k, step, None)

    @pl.when(k == num - 1)
    def _flush():
      out[...] = acc[...]

  call = pl.pallas_call(
      kernel,
      grid=(num, num),
      in_specs=[
          pl.BlockSpec((block, block), lambda i, k: (i, k)),
          pl.BlockSpec((block, block), lambda i, k: (k, 0)),
      ],
      out_specs=pl.BlockSpec((block, block), lambda i, k: (i, 0)),
      out_shape=jax.ShapeDtypeStruct((size, block), _F32),
      scratch_shapes=[pltpu.VMEM((block, block), _F32)],
      name="matmul",
  )
  array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  return call, (array(size, size), array(size, block))


def normalize(rows=64, rolled=False):
  """exp(x) by its sum over rows, all of it in registers: 64 hold 512 rows."""

  def kernel(x, out):
    value = jnp.exp(x[...])
    if rolled:
      value = pltpu.roll(value, 1, 0)
    out[...] = value / value.sum(0, keepdims=True)

  call = pl.pallas_call(
      kernel,
      out_shape=jax.ShapeDtypeStruct((rows, 128), _F32),
      name="normalize",
  )
  return call, (jax.ShapeDtypeStruct((rows, 128), _F32),)


def write_row(donate=True):
  """Writes a row of a cache in place; without donation it must be copied."""

  def kernel(row, cache, out):
    del cache
    pltpu.sync_copy(row, out.at[:8])

  def write(cache, row):
    return pl.pallas_call(
        kernel,
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.VMEM),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        out_shape=jax.ShapeDtypeStruct(cache.shape, cache.dtype),
        input_output_aliases={1: 0},
        name="write_row",
    )(row, cache)

  array = lambda *shape: jax.ShapeDtypeStruct(shape, _F32)
  write = jax.jit(write, donate_argnums=(0,) if donate else ())
  return write, (array(1 << 16, 256), array(8, 256))


def prefetched(num_scalars=1024):
  """A kernel with a table of scalars in SMEM."""

  def kernel(table, x, out):
    out[...] = x[...] * table[0].astype(_F32)

  spec = pl.BlockSpec((8, 128), lambda i, table: (0, 0))
  call = pl.pallas_call(
      kernel,
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=1, grid=(1,), in_specs=[spec], out_specs=spec
      ),
      out_shape=jax.ShapeDtypeStruct((8, 128), _F32),
      name="prefetched",
  )
  table = jax.ShapeDtypeStruct((num_scalars,), jnp.int32)
  return call, (table, jax.ShapeDtypeStruct((8, 128), _F32))


def gpu_scale(rows=64, scratch_rows=8):
  """x * sum(x): all of it in the registers of 128 threads, and scratch."""
  from jax.experimental.pallas import mosaic_gpu as plgpu

  def kernel(x, out, scratch, barrier):
    plgpu.copy_gmem_to_smem(x, scratch.at[:rows], barrier)
    plgpu.barrier_wait(barrier)
    value = scratch[:rows]
    out[...] = value * jnp.sum(value)

  shape = jax.ShapeDtypeStruct((rows, 128), _F32)
  call = plgpu.kernel(
      kernel,
      out_type=shape,
      scratch_types=[
          plgpu.SMEM((max(rows, scratch_rows), 128), _F32),
          plgpu.Barrier(),
      ],
  )
  return call, (shape,)


def fail():
  raise ValueError("no such program")
