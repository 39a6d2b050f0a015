"""The gated delta rule on Hopper GPUs: a kernel for what is sequential.

What a chunk does to a state is linear in it (`algebra.chunk.Sweep`), and is
made of all chunks at once by XLA. The kernel goes through the chunks: a block
of threads takes 64 value channels of a head, keeps that part of the state in
registers, in float32, and writes the state of each chunk's start. With those
XLA computes all chunks at once again. The backward sends the state's cotangent
through the same kernel, from the last chunk to the first. No figure of speed is
known yet: the kernel is compiled for the H100 and checked by interpretation.
"""

import dataclasses
import functools
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas import implementations
from kernels_pallas import interpret
from kernels_pallas.gated_delta_rule import cutting
from kernels_pallas.gated_delta_rule import operands as operands_lib
from kernels_pallas.gated_delta_rule.algebra import chunk as chunk_lib
from kernels_pallas.gated_delta_rule.algebra import fading
from kernels_pallas.gated_delta_rule.algebra import inverse
from kernels_pallas.gated_delta_rule.algebra import products
from kernels_pallas.hardware import gpu_chip
from kernels_pallas.hardware import gpu_layout
from kernels_pallas.hardware import gpu_math
from kernels_pallas.hardware import gpu_registers
from kernels_pallas.hardware import types as hw_types
from kernels_pallas.transformations import manual_axes

plgpu = gpu_layout.plgpu
_CHUNK = 64
_KEY_SIZES = (64, 128)


@dataclasses.dataclass(frozen=True)
class Config:
  """There is nothing to choose: a chunk has the rows of an instruction."""


def why_not(query: jax.Array | jax.ShapeDtypeStruct) -> str | None:
  """Says why the kernel cannot compute this, None if it can."""
  return gpu_chip.why_not(query, "key sizes", _KEY_SIZES[-1])


def forward(
    operands: operands_lib.Operands,
    scale: float,
    config: implementations.Config,
) -> operands_lib.Results:
  """Computes the op.

  Raises:
    ValueError: If the kernel does not have the type or the key size.
  """
  del config
  chunks = _cut(operands)
  states, last = _states(operands, chunks)
  out = _mapped(operands, _forward, chunks, states)
  out = (scale * out).astype(operands.query.dtype)
  return cutting.join(out, operands.query.shape[1]), last


def backward(
    operands: operands_lib.Operands,
    cotangents: operands_lib.Results,
    scale: float,
    config: implementations.Config,
) -> operands_lib.Operands:
  """Computes the cotangents; those of query and key for each of N heads."""
  del config
  chunks, length = _cut(operands), operands.value.shape[1]
  states, _ = _states(operands, chunks)
  d_out = scale * cutting.to_chunks(cotangents[0], _CHUNK).astype(jnp.float32)
  sweep, query = _mapped(operands, _back, chunks, states, d_out)
  d_states, d_first = sweep_chunks(
      sweep, cotangents[1], operands.query.dtype, (query, d_out)
  )
  *found, _ = _mapped(operands, _backward, chunks, states, d_out, d_states)
  is_grouped = operands.key.shape[2] < operands.value.shape[2]
  types = [jnp.float32 if is_grouped else x.dtype for x in operands[:2]]
  types += [x.dtype for x in operands[2:5]]
  found = map(lax.convert_element_type, found, types)
  found = (cutting.join(x, length) for x in found)
  d_query, d_key, d_value, d_log_decay, d_beta = found
  return operands_lib.Operands(
      d_query, d_key, d_value, d_log_decay, d_beta[..., 0], d_first
  )


def sweep_chunks(
    sweep: chunk_lib.Sweep,
    first: Float[Array, "B N H J"],
    dtype: jnp.dtype,
    reads: tuple[Array, Array] | None = None,
) -> tuple[Float[Array, "c B N H J"], Float[Array, "B N H J"]]:
  """States before each chunk, in the order of the sweep, and after all.

  Args:
    sweep: Of each chunk, sequence and head.
    first: Where it begins.
    dtype: Of the operands of products.
    reads: Query and d_out of the cotangent, which goes from the last chunk to
      the first.
  """
  key_size, value_size = first.shape[2:]
  # Channels of zeros stay zero in the state.
  width = _KEY_SIZES[key_size > _KEY_SIZES[0]]
  depth = -(-value_size // _CHUNK) * _CHUNK
  wide = lambda x, size: _pad(x, size).astype(dtype)
  arrays = [wide(sweep.constant, depth)]
  arrays += [wide(x, width) for x in (sweep.factor, sweep.rows)]
  if reads is not None:
    arrays += [wide(reads[0], width), wide(reads[1], depth)]
  total = _pad(sweep.total[..., 0], width)
  first = jnp.swapaxes(_pad(jnp.swapaxes(first, 2, 3), width), 2, 3)
  first = _pad(first, depth)
  num_chunks, batch, num_heads = total.shape[:3]
  struct = lambda *shape: manual_axes.struct(shape, jnp.float32)
  tile = functools.partial(gpu_layout.tile_buffer, 2, dtype=dtype)
  keys, values = tile(_CHUNK, width), tile(_CHUNK, _CHUNK)
  more = {} if reads is None else {"queries": keys, "d_outs": values}
  mode = interpret.mode()
  body = functools.partial(_kernel, reads is not None)
  body.__name__ = "gated_delta_rule"  # pyrefly: ignore[missing-attribute]
  states, last = plgpu.kernel(
      body,
      out_type=(struct(num_chunks, *first.shape), struct(*first.shape)),
      scratch_types={
          "constants": values,
          "factors": keys,
          "rows": keys,
          **more,
          "added": values,
          "read": tile(width, _CHUNK),
          "ready": plgpu.Barrier(num_arrivals=len(arrays), num_barriers=2),
      },
      grid=(batch, num_heads, depth // _CHUNK),
      grid_names=("batch", "head", "part"),
      interpret=plgpu.InterpretGPUParams() if mode is True else mode or None,
  )(total, first, *arrays)
  return (
      states[..., :key_size, :value_size],
      last[..., :key_size, :value_size],
  )


def _kernel(
    is_reversed: bool,
    total: hw_types.Ref,
    first: hw_types.Ref,
    *refs: hw_types.Ref,
    **scratch: Any,
) -> None:
  *arrays, states, last = refs
  batch, head, part = (lax.axis_index(x) for x in ("batch", "head", "part"))
  num_chunks, width = total.shape[0], total.shape[3]
  columns = pl.ds(part * _CHUNK, _CHUNK)
  names = ["constants", "factors", "rows"]
  names += ["queries", "d_outs"] if is_reversed else []
  buffers = {name: scratch[name] for name in names}
  ready, added, read = (scratch[x] for x in ("ready", "added", "read"))

  def index_of(i: hw_types.Index) -> hw_types.Index:
    return num_chunks - 1 - i if is_reversed else i

  def fetch(i: hw_types.Index, slot: hw_types.Index) -> None:
    for (name, buffer), array in zip(buffers.items(), arrays, strict=True):
      here = columns if name in ("constants", "d_outs") else slice(None)
      place = array.at[index_of(i), batch, head, :, here]
      plgpu.copy_gmem_to_smem(place, buffer.at[slot], ready.at[slot])

  for i in range(2):
    pl.when(i < num_chunks)(functools.partial(fetch, i, i))
  layout = plgpu.Layout.WGMMA
  load = functools.partial(plgpu.load, layout=layout, optimized=False)
  state = load(first.at[batch, head, :, columns])

  def visit(i: jax.Array, state: jax.Array) -> jax.Array:
    slot, chunk = lax.rem(i, 2), index_of(i)
    states.at[chunk, batch, head, :, columns][...] = state
    # The state is in registers; products take it from shared memory, rounded.
    read.at[slot][...] = state.astype(read.dtype)
    left = gpu_registers.load_vector(total.at[chunk, batch, head], 0)
    plgpu.commit_smem()
    plgpu.barrier_wait(ready.at[slot])
    taken = gpu_registers.product(buffers["factors"].at[slot], read.at[slot])
    constant = load(buffers["constants"].at[slot]).astype(jnp.float32)
    added.at[slot][...] = (constant - taken).astype(added.dtype)
    plgpu.commit_smem()
    state = state * gpu_math.along(left, (width, _CHUNK), 0)
    transposed = lambda name: buffers[name].at[slot].transpose((1, 0))
    state = gpu_registers.add_product(state, transposed("rows"), added.at[slot])
    if is_reversed:
      d_out = buffers["d_outs"].at[slot]
      state = gpu_registers.add_product(state, transposed("queries"), d_out)
    pl.when(i + 2 < num_chunks)(lambda: fetch(i + 2, slot))
    return state

  state = lax.fori_loop(0, num_chunks, visit, state)
  last.at[batch, head, :, columns][...] = state


def _cut(operands: operands_lib.Operands) -> cutting.Chunks:
  """Chunks of 64 positions, also of a sequence that has fewer."""
  reason = why_not(operands.query)
  if reason is not None:
    raise ValueError(reason)
  *arrays, beta = operands[:5]
  query, key, value, log_decay, beta = (
      cutting.to_chunks(x, _CHUNK) for x in (*arrays, beta[..., None])
  )
  return query, key, value, log_decay, beta


def _states(
    operands: operands_lib.Operands, chunks: cutting.Chunks
) -> tuple[Float[Array, "c B N H J"], Float[Array, "B N H J"]]:
  """Of the chunks' starts, and the last."""
  # The sweep is made of no state: whatever is given is dropped.
  none = jnp.broadcast_to(
      operands.state, (chunks[0].shape[0], *operands.state.shape)
  )
  sweep = _mapped(operands, _ahead, chunks, none)
  return sweep_chunks(sweep, operands.state, operands.query.dtype)


def _mapped(
    operands: operands_lib.Operands, function: Any, *arrays: Any
) -> Any:
  """Of all chunks at once; products take their operands rounded."""
  product = products.Products(operands.query.dtype)
  one = functools.partial(function, product)
  return jax.vmap(functools.partial(cutting.mapped, one))(*arrays)


def _ahead(
    product: products.Products,
    chunk: chunk_lib.Chunk,
    log_decay: Float[Array, "C D"],
) -> chunk_lib.Sweep:
  fades = fading.of(product, log_decay)
  return chunk_lib.ahead(chunk, fades, inverse.Solver)


def _back(
    product: products.Products,
    chunk: chunk_lib.Chunk,
    log_decay: Float[Array, "C D"],
    d_out: Float[Array, "C J"],
) -> tuple[chunk_lib.Sweep, Float[Array, "C H"]]:
  fades = fading.of(product, log_decay)
  return chunk_lib.back(chunk, fades, d_out, inverse.Solver)


def _forward(
    product: products.Products,
    chunk: chunk_lib.Chunk,
    log_decay: Float[Array, "C D"],
) -> Float[Array, "C J"]:
  fades = fading.of(product, log_decay)
  return chunk_lib.forward(chunk, fades, inverse.Solver)[0]


def _backward(
    product: products.Products,
    chunk: chunk_lib.Chunk,
    log_decay: Float[Array, "C D"],
    d_out: Float[Array, "C J"],
    d_state: Float[Array, "H J"],
) -> tuple[Array, ...]:
  fades = fading.of(product, log_decay)
  found, d_logs = chunk_lib.backward(
      chunk, fades, d_out, d_state, inverse.Solver
  )
  d_logs = d_logs.T if log_decay.shape[1] == 1 else d_logs
  return *found[:3], d_logs, *found[3:]


def _pad(x: Array, size: int) -> Array:
  """The last axis to `size`, with zeros."""
  return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])
