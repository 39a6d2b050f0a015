"""Linear attention on Hopper GPUs: one kernel, for both passes.

A block of threads takes 64 value channels of a head through the sequence, in
chunks of 64 positions, and keeps that part of the state in registers. Products
take the weights and the state rounded, as their other operand is. No figure of
speed is known yet: the kernel is compiled for the H100 and checked by
interpretation.
"""

import dataclasses
import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from kernels_pallas import interpret
from kernels_pallas.hardware import gpu_chip
from kernels_pallas.hardware import gpu_layout
from kernels_pallas.hardware import gpu_math
from kernels_pallas.hardware import gpu_registers
from kernels_pallas.hardware import types as hw_types
from kernels_pallas.linear_attention import sweep as sweep_lib
from kernels_pallas.transformations import manual_axes

plgpu = gpu_layout.plgpu
_CHUNK = 64
_HEAD_DIMS = (64, 128)


@dataclasses.dataclass(frozen=True)
class Config:
  """There is nothing to choose: a chunk has the rows of an instruction."""


def run(
    operands: sweep_lib.Operands, sweep: sweep_lib.Sweep
) -> sweep_lib.Swept:
  """One sweep, see `sweep`.

  Raises:
    ValueError: If the kernel does not have the type or the head size.
  """
  query, key, value, log_decay, state = operands
  reason = why_not(query)
  if reason is not None:
    raise ValueError(reason)
  (batch, length, _, head_dim), num_heads = query.shape, log_decay.shape[0]
  # Channels of zeros stay zero in the state, and add nothing to out.
  width = _HEAD_DIMS[head_dim > _HEAD_DIMS[0]]
  arrays = [_pad(x, width) for x in (query, key, value)]
  extra = width - head_dim
  state = jnp.pad(state, ((0, 0), (0, 0), (0, extra), (0, extra)))
  out_shape = (batch, arrays[0].shape[1], num_heads, width)
  dtype = jnp.float32 if sweep.is_out_wide else query.dtype
  tile = functools.partial(gpu_layout.tile_buffer, dtype=query.dtype)
  mode = interpret.mode()
  body = functools.partial(_kernel, sweep, length)
  body.__name__ = "linear_attention"  # pyrefly: ignore[missing-attribute]
  out, state = plgpu.kernel(
      body,
      out_type=(
          manual_axes.struct(out_shape, dtype),
          manual_axes.struct(state.shape, jnp.float32),
      ),
      scratch_types={
          "queries": tile(2, _CHUNK, width),
          "keys": tile(2, _CHUNK, width),
          "values": tile(2, _CHUNK, _CHUNK),
          "added": tile(2, _CHUNK, _CHUNK),
          "read": tile(2, width, _CHUNK),
          "ready": plgpu.Barrier(num_arrivals=3, num_barriers=2),
      },
      grid=(batch, num_heads, width // _CHUNK),
      grid_names=("batch", "head", "part"),
      interpret=plgpu.InterpretGPUParams() if mode is True else mode or None,
  )(*arrays, log_decay.astype(jnp.float32), state)
  return out[:, :length, :, :head_dim], state[..., :head_dim, :head_dim]


def why_not(query: jax.Array | jax.ShapeDtypeStruct) -> str | None:
  """Says why the kernel cannot compute this, None if it can."""
  return gpu_chip.why_not(query, "heads", _HEAD_DIMS[-1])


def _kernel(
    sweep: sweep_lib.Sweep,
    length: int,
    query: hw_types.Ref,
    key: hw_types.Ref,
    value: hw_types.Ref,
    log_decay: hw_types.Ref,
    first: hw_types.Ref,
    out: hw_types.Ref,
    last: hw_types.Ref,
    *,
    queries: hw_types.Ref,
    keys: hw_types.Ref,
    values: hw_types.Ref,
    added: hw_types.Ref,
    read: hw_types.Ref,
    ready: hw_types.Barrier,
) -> None:
  batch, head, part = (lax.axis_index(x) for x in ("batch", "head", "part"))
  num_chunks = query.shape[1] // _CHUNK
  num_heads = log_decay.shape[0]
  rate = log_decay[head]
  columns = pl.ds(part * _CHUNK, _CHUNK)
  whole = slice(None)

  def index_of(i: hw_types.Index) -> hw_types.Index:
    return num_chunks - 1 - i if sweep.is_reversed else i

  def fetch(i: hw_types.Index, slot: hw_types.Index) -> None:
    rows = pl.ds(index_of(i) * _CHUNK, _CHUNK)
    for array, buffer, here in (
        (query, queries, whole),
        (key, keys, whole),
        (value, values, columns),
    ):
      own = lax.div(head, num_heads // array.shape[2])
      plgpu.copy_gmem_to_smem(
          array.at[batch, rows, own, here], buffer.at[slot], ready.at[slot]
      )

  for i in range(2):
    pl.when(i < num_chunks)(functools.partial(fetch, i, i))
  state = plgpu.load(
      first.at[batch, head, :, columns],
      layout=plgpu.Layout.WGMMA,
      optimized=False,
  )

  def visit(i: jax.Array, state: jax.Array) -> jax.Array:
    slot, start = lax.rem(i, 2), index_of(i) * _CHUNK
    size = jnp.minimum(length - start, _CHUNK)
    # The state is in registers; products take it from shared memory, rounded.
    read.at[slot][...] = state.astype(read.dtype)
    plgpu.commit_smem()
    plgpu.barrier_wait(ready.at[slot])
    square = (_CHUNK, _CHUNK)
    rows, cols = (gpu_registers.positions(square, a, 0) for a in (0, 1))
    # Steps from the chunk's start to a position, and from there to its end.
    before, after = rows + 1, jnp.maximum(size - 1 - rows, 0)
    if sweep.is_reversed:
      before, after = after, before
    power = lambda exponent: jnp.exp2(
        rate * gpu_math.LOG2_E * exponent.astype(jnp.float32)
    )
    ago = cols - rows if sweep.is_reversed else rows - cols
    factor = sweep.in_scale * sweep.out_scale
    weights = jnp.where(ago >= 0, factor * power(jnp.maximum(ago, 0)), 0.0)
    attn = gpu_registers.product(
        queries.at[slot], keys.at[slot].transpose((1, 0))
    )
    attn = (attn * weights).astype(queries.dtype)
    total = gpu_registers.product(queries.at[slot], read.at[slot])
    total = total * (sweep.out_scale * power(before))
    total = gpu_registers.accumulate(total, attn, values.at[slot])
    here = plgpu.load(
        values.at[slot], layout=plgpu.Layout.WGMMA, optimized=False
    )
    scaled = here.astype(jnp.float32) * (sweep.in_scale * power(after))
    added.at[slot][...] = scaled.astype(added.dtype)
    plgpu.commit_smem()
    kept = state * jnp.exp2(rate * gpu_math.LOG2_E * size.astype(jnp.float32))
    # Out has read the state of the chunk's start; only now is it moved on.
    state = gpu_registers.add_product(
        kept, keys.at[slot].transpose((1, 0)), added.at[slot]
    )
    pl.when(i + 2 < num_chunks)(lambda: fetch(i + 2, slot))
    place = out.at[batch, pl.ds(start, _CHUNK), head, columns]
    place[...] = total.astype(out.dtype)
    return state

  state = lax.fori_loop(0, num_chunks, visit, state)
  last.at[batch, head, :, columns][...] = state


def _pad(x: jax.Array, width: int) -> jax.Array:
  """To whole chunks and head sizes: zeros add nothing to a state."""
  padding = (0, -x.shape[1] % _CHUNK), (0, 0), (0, width - x.shape[3])
  return jnp.pad(x, ((0, 0), *padding))
