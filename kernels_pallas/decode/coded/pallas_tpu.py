"""A step over coded blocks on a TPU, in one pass.

A step of the grid is some blocks of a sequence, of all its heads. Codes are
factors as they are, numbers of eight bits: the scale of a key's channel
multiplies the query, that of a value its weight, and offsets are a number a
block and head:

  q . (offset + scale code) = (q scale) . code + sum of q offset

The other factor, query or weights, is two numbers of eight bits: fifteen bits
of its row's largest number. With float32 it stays what it is.

Letters: B batch, N query heads, K key and value heads, G = N / K, M blocks, m
blocks of a step, R = 128 tokens of a block, H = 128 head size.
"""

from collections.abc import Callable, Sequence
import functools
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8, UInt8

from kernels_pallas import interpret
from kernels_pallas.decode import shapes
from kernels_pallas.decode import tpu_step
from kernels_pallas.decode.coded import codes
from kernels_pallas.decode.coded import cost
from kernels_pallas.hardware import tpu_layout
from kernels_pallas.hardware import tpu_tile
from kernels_pallas.hardware import types as hw_types
from kernels_pallas.transformations import exported
from kernels_pallas.transformations import manual_axes

_LANES = tpu_layout.LANES
_SIZE = 128
# Bytes of the blocks of keys of a step at most.
_BLOCK_BYTES = 1 << 20
# Blocks at once at most.
_AT_ONCE = 16
_LAST_BY_LAST = (((1,), (1,)), ((), ()))
_LAST_BY_FIRST = (((1,), (0,)), ((), ()))
# The low code of each of four bytes.
_NIBBLES = 0x0F0F0F0F


class Refs(NamedTuple):
  """What the kernel sees, by name."""

  positions: hw_types.Ref
  query: hw_types.Ref
  newest: Sequence[hw_types.Ref]
  data: Sequence[hw_types.Ref]
  scale: Sequence[hw_types.Ref]
  offset: Sequence[hw_types.Ref]
  out: hw_types.Ref
  highest: hw_types.Ref
  total: hw_types.Ref
  acc: hw_types.Ref


def attend(
    query: Float[Array, "B N H"],
    keys: codes.Blocks,
    values: codes.Blocks,
    newest_key: Float[Array, "B K R H"],
    newest_value: Float[Array, "B K R H"],
    positions: Int[Array, "B"],
    scale: float,
) -> Float[Array, "B N H"]:
  """Computes the op, see `api`.

  Raises:
    ValueError: If blocks have not 128 tokens, or heads not 128 numbers.
  """
  exported.check_batch("attend_coded", query)
  batch, num_heads, head_dim = query.shape
  num_kv_heads, size = newest_key.shape[1:3]
  if (size, head_dim) != (_SIZE, _LANES):
    raise ValueError(
        f"blocks of {size} tokens and heads of {head_dim}: the TPU kernel takes"
        f" {_SIZE} and {_LANES}"
    )
  num_blocks = keys.data.shape[1]
  step = _blocks_of_step(num_blocks, num_kv_heads)
  small = [keys.scale, values.scale, keys.offset, values.offset]
  by_step = lambda x: pl.BlockSpec(
      (1, step, *x.shape[2:]),
      lambda b, c, *_: (b, c, *(0,) * (x.ndim - 2)),
  )
  given = [query, newest_key, newest_value]
  coded = [keys.data, values.data, *small]
  wide = lambda: pltpu.VMEM((num_heads, _LANES), jnp.float32)
  shape = shapes.Shape(
      batch=batch,
      num_heads=num_heads,
      num_kv_heads=num_kv_heads,
      capacity=num_blocks * size,
      head_dim=head_dim,
  )
  work = cost.attend(shape, size, query.dtype.itemsize)
  return pl.pallas_call(
      functools.partial(_kernel, scale, num_kv_heads, step),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=1,
          grid=(batch, num_blocks // step),
          in_specs=[
              *map(tpu_step.by_sequence, given),
              *map(by_step, coded),
          ],
          out_specs=tpu_step.by_sequence(query),
          scratch_shapes=[wide(), wide(), wide()],
      ),
      out_shape=manual_axes.struct(query.shape, query.dtype),
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel", "arbitrary"),
          # Blocks are those of the grid, whatever the positions.
          disable_bounds_checks=True,
      ),
      cost_estimate=exported.estimate(
          flops=work.flops,
          bytes_accessed=work.bytes_accessed,
          transcendentals=work.transcendentals,
      ),
      interpret=interpret.mode(),
      name="coded_decode",
  )(positions, *given, *coded)


def _blocks_of_step(num_blocks: int, num_kv_heads: int) -> int:
  most = max(1, _BLOCK_BYTES // (num_kv_heads * _SIZE * _LANES // 2))
  fits = [n for n in range(1, most + 1) if num_blocks % n == 0]
  return max(fits)


def _kernel(
    scale: float,
    num_kv_heads: int,
    step: int,
    positions: hw_types.Ref,
    query: hw_types.Ref,
    newest_key: hw_types.Ref,
    newest_value: hw_types.Ref,
    key_data: hw_types.Ref,
    value_data: hw_types.Ref,
    key_scale: hw_types.Ref,
    value_scale: hw_types.Ref,
    key_offset: hw_types.Ref,
    value_offset: hw_types.Ref,
    out: hw_types.Ref,
    *scratch: hw_types.Ref,
) -> None:
  refs = Refs(
      positions,
      query,
      (newest_key, newest_value),
      (key_data, value_data),
      (key_scale, value_scale),
      (key_offset, value_offset),
      out,
      *scratch,
  )
  sequence, index = pl.program_id(0), pl.program_id(1)
  position = positions[sequence]
  num_full = position // _SIZE

  @pl.when(index == 0)
  def _():
    _start(scale, num_kv_heads, refs, position)

  count = jnp.clip(num_full - index * step, 0, step)
  width = max(n for n in range(1, _AT_ONCE + 1) if step % n == 0)

  @pl.loop(0, (count + width - 1) // width)
  def _(part: Array):
    first = pl.multiple_of(part * width, width)
    _visit(scale, num_kv_heads, refs, first, count, width)

  @pl.when(index == pl.num_programs(1) - 1)
  def _():
    total = jnp.maximum(refs.total[:, :1], 1e-30)
    found = jnp.where(position >= 0, refs.acc[...] / total, 0)
    out[0] = found.astype(out.dtype)


def _start(
    scale: float, num_kv_heads: int, refs: Refs, position: Array
) -> None:
  """The softmax of the newest block alone."""
  query = refs.query[0]
  key, value = refs.newest
  by_head = lambda make: jnp.concatenate(
      [make(k, rows) for k, rows in _heads(query, num_kv_heads)]
  )
  dtype = tpu_step.product_type(query.dtype, key.dtype)
  logits = scale * by_head(
      lambda k, rows: tpu_tile.multiply(
          query[rows].astype(dtype), key[0, k].astype(dtype), _LAST_BY_LAST
      )
  )
  lane = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
  logits = jnp.where(lane <= position % _SIZE, logits, tpu_tile.FORBIDDEN)
  highest = logits.max(axis=1, keepdims=True)
  weights = jnp.exp(logits - highest)
  refs.highest[...] = jnp.broadcast_to(highest, refs.highest.shape)
  total = weights.sum(axis=1, keepdims=True)
  refs.total[...] = jnp.broadcast_to(total, refs.total.shape)
  refs.acc[...] = by_head(
      lambda k, rows: tpu_tile.multiply(
          weights[rows].astype(dtype), value[0, k].astype(dtype), _LAST_BY_FIRST
      )
  )


def _visit(
    scale: float,
    num_kv_heads: int,
    refs: Refs,
    first: Array,
    num_full: Array,
    width: int,
) -> None:
  """Takes `width` blocks into the softmax, of which `num_full` are full.

  Args:
    scale: Of the logits.
    num_kv_heads: K.
    refs: What the kernel sees.
    first: The first of them, among those of this step.
    num_full: Blocks of this step that count.
    width: Blocks at once: what one waits for, another computes.
  """
  query = scale * refs.query[0].astype(jnp.float32)
  groups, blocks = len(query) // num_kv_heads, [first + i for i in range(width)]
  is_exact = refs.query.dtype == jnp.float32
  wide = lambda ref, block: ref[0, block].astype(jnp.float32)
  found = []
  for block in blocks:
    scaled = query * _repeated(wide(refs.scale[0], block), groups)
    more = query * _repeated(wide(refs.offset[0], block), groups)
    products = _products(
        scaled,
        lambda k, block=block: _codes(refs.data[0][0, block, k]),
        num_kv_heads,
        is_exact,
    )
    logits = products + more.sum(axis=1, keepdims=True)
    found.append(jnp.where(block < num_full, logits, tpu_tile.FORBIDDEN))
  logits = jnp.concatenate(found, axis=1)
  before = refs.highest[:, :1]
  highest = jnp.maximum(before, logits.max(axis=1, keepdims=True))
  shrink, weights = jnp.exp(before - highest), jnp.exp(logits - highest)
  total = shrink * refs.total[:, :1] + weights.sum(axis=1, keepdims=True)
  refs.highest[...] = jnp.broadcast_to(highest, refs.highest.shape)
  refs.total[...] = jnp.broadcast_to(total, refs.total.shape)
  along = lambda ref: _repeated(
      jnp.concatenate([wide(ref, block) for block in blocks], axis=1), groups
  )
  more = weights * along(refs.offset[1])
  added = _products(
      weights * along(refs.scale[1]),
      lambda k: jnp.concatenate(
          [_codes(refs.data[1][0, block, k]) for block in blocks]
      ),
      num_kv_heads,
      is_exact,
  )
  added = added + more.sum(axis=1, keepdims=True)
  refs.acc[...] = shrink * refs.acc[...] + added


def _products(
    x: Float[Array, "N L"],
    codes_of: Callable[[int], Int8[Array, "_ _"]],
    num_kv_heads: int,
    is_exact: bool,
) -> Float[Array, "N J"]:
  """Products with the codes of each row's key head.

  Args:
    x: One factor.
    codes_of: The other, by key head.
    num_kv_heads: K.
    is_exact: Whether x is taken as float32; else as 15 bits of each row's
      largest number, which two numbers of 8 bits are.
  """
  heads = _heads(x, num_kv_heads)
  if is_exact:
    return jnp.concatenate([
        tpu_tile.multiply(
            x[rows], codes_of(k).astype(jnp.float32), _LAST_BY_FIRST
        )
        for k, rows in heads
    ])
  step = jnp.maximum(jnp.abs(x).max(axis=1, keepdims=True), 1e-30) / 127
  high = jnp.round(x / step)
  low = jnp.round((x - high * step) * (254 / step))
  high, low = high.astype(jnp.int8), low.astype(jnp.int8)
  found = [
      jax.lax.dot_general(
          jnp.concatenate([high[rows], low[rows]]),
          codes_of(k),
          _LAST_BY_FIRST,
          preferred_element_type=jnp.int32,
      ).astype(jnp.float32)
      for k, rows in heads
  ]
  groups = len(x) // num_kv_heads
  join = lambda part: jnp.concatenate([product[part] for product in found])
  of_high, of_low = join(slice(0, groups)), join(slice(groups, None))
  return step * (of_high + of_low / 254)


def _heads(query: Array, num_kv_heads: int) -> list[tuple[int, slice]]:
  """Each key head, with the rows of its query heads."""
  groups = len(query) // num_kv_heads
  return [(k, slice(k * groups, (k + 1) * groups)) for k in range(num_kv_heads)]


def _repeated(x: Float[Array, "K L"], groups: int) -> Float[Array, "N L"]:
  """Each key head's row for each of its query heads."""
  rows = [
      jnp.broadcast_to(x[k : k + 1], (groups, x.shape[1]))
      for k in range(len(x))
  ]
  return jnp.concatenate(rows)


def _codes(data: UInt8[Array, "n J"]) -> Int8[Array, "_ J"]:
  """All 2 n rows of codes of a block: channels of keys, tokens of values."""
  words = pltpu.bitcast(data, jnp.int32)
  nibbles = lambda x: pltpu.bitcast(x & _NIBBLES, jnp.int8)
  high = jax.lax.shift_right_logical(words, jnp.int32(4))
  return jnp.concatenate([nibbles(words), nibbles(high)])
