"""A decode step on a TPU, in one pass over the cache, which stays where it is.

A step of the grid is a chunk of the slots of a sequence, of all its heads:

  1. At the first chunk the slots are chosen: scores and positions, which are
     small, are in VMEM before keys are needed. The softmax starts from the new
     token, and the rows around each slot are asked for.
  2. Logits of a chunk join the softmax (m, l, acc) as usual, and are kept.
  3. At the last chunk m and l are final: the kept logits become weights, heads
     that share a key are joined, and the scores are written. The rows around
     each slot go back with the new one among them.

What lay in the slot is masked, so that it does not matter whether it has been
written yet. The cache is one operand, aliased with its output: a second operand
of the same array would make XLA copy it.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas import interpret
from kernels_pallas.heavy_hitter_decode import cost
from kernels_pallas.heavy_hitter_decode import rule as rule_lib
from kernels_pallas.heavy_hitter_decode import shapes
from kernels_pallas.heavy_hitter_decode import slots as slots_lib
from kernels_pallas.tiles import tpu_layout
from kernels_pallas.tiles import tpu_tile

_LANES = tpu_layout.LANES
_MIB = 1 << 20
# Bytes of a block of keys at most: they hide what a step of the grid costs.
_BLOCK_BYTES = 2 * _MIB
# Nothing is computed while the first block comes: a small part of the whole, if
# that leaves enough slots for their latencies to overlap.
_MIN_STEPS, _MIN_CHUNK = 4, 512
_LAST_BY_LAST = (((1,), (1,)), ((), ()))
_LAST_BY_FIRST = (((1,), (0,)), ((), ()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Sizes.

  Attributes:
    chunk: Slots of a step, which divide the capacity: all, or a multiple of the
      128 lanes; None is up to two MiB of keys.
  """

  chunk: int | None = None

  def __post_init__(self):
    if self.chunk is not None and self.chunk < 1:
      raise ValueError(f"chunk={self.chunk} must be at least 1")


class Sizes(NamedTuple):
  """Of a call, and bytes of an element of the query and of the cache."""

  batch: int
  num_heads: int
  num_kv_heads: int
  capacity: int
  head_dim: int
  itemsize: int
  cache_itemsize: int

  @property
  def num_groups(self) -> int:
    """G, query heads of a key head."""
    return self.num_heads // self.num_kv_heads

  @property
  def tile_rows(self) -> int:
    """Rows that memory moves together: 8 of 32 bits."""
    return 32 // self.cache_itemsize


def step(
    query: Float[Array, "B N H"],
    key: Float[Array, "B K H"],
    value: Float[Array, "B K H"],
    cache: slots_lib.Slots,
    positions: Int[Array, "B"],
    rule: rule_lib.Rule,
) -> tuple[Float[Array, "B N H"], slots_lib.Slots, Int[Array, "B K"]]:
  """Computes the op, see `reference`.

  Raises:
    ValueError: If a TPU has no such type, or the sizes do not fit.
  """
  sizes = _sizes_of(query, cache)
  chunk = choose_chunk(rule.config or Config(), sizes)
  check_vmem(chunk, sizes)
  operands = [query, key, value]
  specs = [_by_sequence(x) for x in operands]
  small = {
      name: getattr(cache, name)
      for name in ("score", "pos", "key_scale", "value_scale")
      if getattr(cache, name) is not None
  }
  rows = pl.BlockSpec(
      (1, sizes.num_kv_heads, chunk, sizes.head_dim),
      lambda b, c, _: (b, 0, c, 0),
  )
  operands += [*small.values(), cache.key, cache.value]
  specs += [*map(_by_sequence, small.values()), rows, rows]
  anywhere = pl.BlockSpec(memory_space=pl.ANY)
  slot = jax.ShapeDtypeStruct((sizes.batch, 1, sizes.num_kv_heads), jnp.int32)
  outputs = [query, slot, *small.values(), cache.key, cache.value]
  out, slot, *new = pl.pallas_call(
      functools.partial(_kernel, rule, sizes, tuple(small)),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=1,
          grid=(sizes.batch, sizes.capacity // chunk),
          in_specs=specs,
          out_specs=[
              _by_sequence(query),
              _by_sequence(slot, memory_space=pltpu.SMEM),
              *map(_by_sequence, small.values()),
              anywhere,
              anywhere,
          ],
          scratch_shapes=_scratch(sizes, cache.key.dtype),
      ),
      out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
      # Operands are counted from the positions on.
      input_output_aliases={4 + i: 2 + i for i in range(len(small) + 2)},
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel", "arbitrary"),
          vmem_limit_bytes=_limit(),
      ),
      cost_estimate=_cost(sizes),
      interpret=interpret.mode(),
      name="heavy_hitter_decode",
  )(positions, *operands)
  names = (*small, "key", "value")
  cache = slots_lib.Slots(**dict(zip(names, new, strict=True)))
  return out, cache, slot[:, 0]


def choose_chunk(config: Config, sizes: Sizes) -> int:
  """The slots of a step.

  Raises:
    ValueError: If the capacity is not whole tiles, or the chunk asked for does
      not divide it.
  """
  capacity, rows = sizes.capacity, sizes.tile_rows
  if capacity % rows:
    raise ValueError(
        f"a capacity of {capacity} slots must be a multiple of {rows}, the rows"
        " of a tile of a TPU with elements of"
        f" {8 * sizes.cache_itemsize} bits, such as"
        f" {tpu_layout.round_up(capacity, rows)}"
    )
  if config.chunk is not None:
    chunk = config.chunk
    if capacity % chunk or (chunk != capacity and chunk % _LANES):
      raise ValueError(
          f"chunk={chunk} must divide the {capacity} slots, and be a multiple"
          f" of the {_LANES} lanes of a TPU or all of them"
      )
    return chunk
  divisors = [n for n in range(_LANES, capacity, _LANES) if capacity % n == 0]
  row = sizes.num_kv_heads * sizes.head_dim * sizes.cache_itemsize
  part = sizes.batch * capacity // _MIN_STEPS
  most = min(_BLOCK_BYTES // row, max(part, _MIN_CHUNK))
  fits = lambda n: n <= most and sum(vmem(n, sizes).values()) <= _limit()
  divisors.append(capacity)
  return max(filter(fits, divisors), default=divisors[0])


def vmem(chunk: int, sizes: Sizes) -> dict[str, int]:
  """Bytes of VMEM that a step takes at most, by what for.

  Blocks are there twice, to be copied ahead.
  """
  up = tpu_layout.round_up
  lanes = up(sizes.head_dim, _LANES)
  slots = up(sizes.capacity, _LANES)
  heads, kv_heads = up(sizes.num_heads, 8), up(sizes.num_kv_heads, 8)
  num_small = 4 if sizes.cache_itemsize == 1 else 2
  tile = sizes.num_kv_heads * 32 * lanes
  vectors = 2 * up(sizes.num_heads, 16) + 2 * up(sizes.num_kv_heads, 16)
  stored = sizes.cache_itemsize * up(chunk, sizes.tile_rows) * lanes
  return {
      "keys and values": 4 * sizes.num_kv_heads * stored,
      "scores and positions": 2 * 2 * num_small * 4 * kv_heads * slots,
      "logits": 4 * heads * slots,
      "vectors": (
          2 * vectors * lanes * sizes.itemsize
          + 4 * heads * (lanes + 4 * _LANES)
      ),
      "rows to write": 2 * tile,
      "registers": (
          _MIB + 3 * 4 * heads * up(chunk, _LANES) + 4 * 4 * kv_heads * slots
      ),
  }


def check_vmem(chunk: int, sizes: Sizes) -> None:
  """Raises ValueError, with the arithmetic, if a step does not fit."""
  need = vmem(chunk, sizes)
  if sum(need.values()) <= _limit():
    return
  parts = " + ".join(f"{name} {n / _MIB:.1f}" for name, n in need.items())
  info = tpu_layout.tpu_info()
  raise ValueError(
      f"{sizes.capacity} slots of {sizes.num_kv_heads} heads of"
      f" {sizes.head_dim}, in chunks of {chunk}, need"
      f" {sum(need.values()) / _MIB:.1f} MiB of VMEM: {parts}; a TPU"
      f" {info.chip_version} has {info.vmem_capacity_bytes / _MIB:.1f} MiB, of"
      f" which a kernel may take {_limit() / _MIB:.1f}: use a smaller chunk or"
      " fewer slots"
  )


class _Refs(NamedTuple):
  """What the kernel sees, by name; scales are None unless int8."""

  positions: Any
  vectors: Any  # query, key, value
  small: Any  # score, pos and scales, by name
  stored: Any  # key and value of the chunk
  out: Any
  slot: Any
  new_small: Any
  new_stored: Any  # in HBM
  scratch: Any


class _Scratch(NamedTuple):
  """Kept from chunk to chunk.

  Attributes:
    logits: [N, C].
    highest: m [N, 128], equal along lanes, as are the next.
    total: l.
    new_logit: Of the new token.
    slot: Of each key head [K, 128], as float32.
    acc: [N, H].
    tiles: Rows around the slots of keys and of values, [2, K, R, H].
    reads: A semaphore.
    writes: Another.
  """

  logits: Any
  highest: Any
  total: Any
  new_logit: Any
  slot: Any
  acc: Any
  tiles: Any
  reads: Any
  writes: Any


def _scratch(sizes: Sizes, dtype: Any) -> list[Any]:
  heads, wide = sizes.num_heads, jnp.float32
  tiles = (2, sizes.num_kv_heads, sizes.tile_rows, sizes.head_dim)
  return [
      pltpu.VMEM((heads, sizes.capacity), wide),
      *(3 * [pltpu.VMEM((heads, _LANES), wide)]),
      pltpu.VMEM((sizes.num_kv_heads, _LANES), wide),
      pltpu.VMEM((heads, sizes.head_dim), wide),
      pltpu.VMEM(tiles, dtype),
      pltpu.SemaphoreType.DMA,
      pltpu.SemaphoreType.DMA,
  ]


def _kernel(rule, sizes, names, positions, *refs) -> None:
  refs = iter(refs)
  take = lambda num: [next(refs) for _ in range(num)]
  refs = _Refs(
      positions=positions,
      vectors=take(3),
      small=dict(zip(names, take(len(names)), strict=True)),
      stored=take(2),
      out=next(refs),
      slot=next(refs),
      new_small=dict(zip(names, take(len(names)), strict=True)),
      new_stored=take(2),
      scratch=_Scratch(*take(9)),
  )
  sequence, index = pl.program_id(0), pl.program_id(1)
  position = positions[sequence]
  num_chunks = sizes.capacity // refs.stored[0].shape[2]
  # A single chunk is one block of code, which the compiler can interleave.
  at = lambda step: (
      pl.when(index == step) if num_chunks > 1 else lambda body: body()
  )

  @pl.when(position >= 0)
  def _():
    @at(0)
    def _():
      _choose(rule, sizes, refs, position)
      _start_reads(sizes, refs, sequence)
      _start(rule, sizes, refs)

    _visit(rule, sizes, refs, position, index)

    @at(num_chunks - 1)
    def _():
      _await(refs.scratch.tiles, refs.scratch.reads)
      _merge(sizes, refs)
      _start_writes(sizes, refs, sequence)
      _finish(rule, sizes, refs, position)
      _await(refs.scratch.tiles, refs.scratch.writes)

  @pl.when(position < 0)
  def _():
    refs.out[...] = jnp.zeros_like(refs.out)
    for k in range(sizes.num_kv_heads):
      refs.slot[0, 0, k] = -1
    for name in names:
      refs.new_small[name][...] = refs.small[name][...]


def _choose(rule, sizes, refs, position) -> None:
  """Slots, as vectors and as scalars."""
  score, pos = refs.small["score"][0], refs.small["pos"][0]
  order = rule_lib.order(score, pos, position, rule)
  # Indices as float32: lanes are reduced of that alone.
  column = jax.lax.broadcasted_iota(jnp.int32, order.shape, 1)
  column = column.astype(jnp.float32)
  least = order.min(axis=1, keepdims=True)
  first = jnp.where(order == least, column, float(sizes.capacity))
  slot = first.min(axis=1, keepdims=True)
  refs.scratch.slot[...] = jnp.broadcast_to(slot, refs.scratch.slot.shape)
  for k in range(sizes.num_kv_heads):
    refs.slot[0, 0, k] = jnp.min(first[k : k + 1]).astype(jnp.int32)


def _start(rule, sizes, refs) -> None:
  """The softmax of the new token alone."""
  query, key, value = (x[0].astype(jnp.float32) for x in refs.vectors)
  key, value = _stored_rows(key, refs), _stored_rows(value, refs)
  scratch = refs.scratch
  for k in range(sizes.num_kv_heads):
    heads = _heads(sizes, k)
    logit = (query[heads] * key[k : k + 1]).sum(axis=1, keepdims=True)
    logit = rule_lib.capped(rule.scale * logit, rule)
    shape = (sizes.num_groups, _LANES)
    scratch.new_logit[heads] = jnp.broadcast_to(logit, shape)
    scratch.highest[heads] = jnp.broadcast_to(logit, shape)
    scratch.acc[heads] = jnp.broadcast_to(
        value[k : k + 1], (sizes.num_groups, sizes.head_dim)
    )
  scratch.total[...] = jnp.ones_like(scratch.total)


def _visit(rule, sizes, refs, position, index) -> None:
  """Takes a chunk into the softmax."""
  scratch, chunk = refs.scratch, refs.stored[0].shape[2]
  lanes = _lanes(sizes, index, chunk)
  pos = refs.small["pos"][0, :, lanes]
  column = jax.lax.broadcasted_iota(jnp.int32, pos.shape, 1) + index * chunk
  slot = scratch.slot[:, :1].astype(jnp.int32)
  is_seen = rule_lib.sees(pos, position, rule) & (column != slot)
  query = refs.vectors[0][0].astype(jnp.float32)
  dtype = _product_type(refs)
  scaled = lambda x, name: (
      x * refs.small[name][0, :, lanes] if name in refs.small else x
  )
  factor = scaled(jnp.full(pos.shape, rule.scale), "key_scale")
  for k in range(sizes.num_kv_heads):
    heads, row = _heads(sizes, k), slice(k, k + 1)
    logits = tpu_tile.multiply(
        query[heads].astype(dtype),
        refs.stored[0][0, k].astype(dtype),
        _LAST_BY_LAST,
    )
    logits = rule_lib.capped(logits * factor[row], rule)
    scratch.logits[heads, lanes] = jnp.where(
        is_seen[row], logits, tpu_tile.FORBIDDEN
    )
  logits = scratch.logits[:, lanes]
  before = scratch.highest[:, :1]
  highest = jnp.maximum(before, logits.max(axis=1, keepdims=True))
  correction = jnp.exp(before - highest)
  weights = jnp.exp(logits - highest)
  total = correction * scratch.total[:, :1] + weights.sum(axis=1, keepdims=True)
  scratch.highest[...] = jnp.broadcast_to(highest, scratch.highest.shape)
  scratch.total[...] = jnp.broadcast_to(total, scratch.total.shape)
  value_scale = scaled(jnp.ones(pos.shape), "value_scale")
  for k in range(sizes.num_kv_heads):
    heads = _heads(sizes, k)
    shares = weights[heads]
    if "value_scale" in refs.small:
      shares = shares * value_scale[k : k + 1]
    added = tpu_tile.multiply(
        shares.astype(dtype),
        refs.stored[1][0, k].astype(dtype),
        _LAST_BY_FIRST,
    )
    scratch.acc[heads] = correction[heads] * scratch.acc[heads] + added


def _finish(rule, sizes, refs, position) -> None:
  """Out, and what was kept of the tokens, chunk by chunk."""
  scratch = refs.scratch
  inverse = 1 / scratch.total[:, :1]
  refs.out[0] = (scratch.acc[...] * inverse).astype(refs.out.dtype)
  highest = scratch.highest[:, :1]
  weights_of = lambda logits: jnp.exp(logits - highest) * inverse
  of_new = _joined(rule, sizes, weights_of(scratch.new_logit[:, :1]))
  scales = {
      name: slots_lib.quantize(row[0])[1][:, None]
      for name, row in zip(
          ("key_scale", "value_scale"), refs.vectors[1:], strict=True
      )
      if name in refs.small
  }
  slot = scratch.slot[:, :1].astype(jnp.int32)
  chunk = refs.stored[0].shape[2]

  @pl.loop(0, sizes.capacity // chunk)
  def _(index):
    lanes = _lanes(sizes, index, chunk)
    new = {name: ref.at[0, :, lanes] for name, ref in refs.new_small.items()}
    old = {name: ref[0, :, lanes] for name, ref in refs.small.items()}
    mass = _joined(rule, sizes, weights_of(scratch.logits[:, lanes]))
    column = jax.lax.broadcasted_iota(jnp.int32, mass.shape, 1) + index * chunk
    is_slot = column == slot
    score = rule.decay * old["score"] + mass
    new["score"][...] = jnp.where(is_slot, of_new, score)
    new["pos"][...] = jnp.where(is_slot, position, old["pos"])
    for name, scale in scales.items():
      new[name][...] = jnp.where(is_slot, scale, old[name])


def _joined(rule, sizes, weights) -> Any:
  """Of query heads [N, ...] the sum or maximum for each key head [K, ...]."""
  if sizes.num_groups == 1:
    return weights
  parts = [weights[_heads(sizes, k)] for k in range(sizes.num_kv_heads)]
  join = lambda x: getattr(x, rule.reduce)(axis=0, keepdims=True)
  return jnp.concatenate([join(part) for part in parts])


def _merge(sizes, refs) -> None:
  """Puts the new rows among those around their slots."""
  tiles = refs.scratch.tiles
  shape = (sizes.tile_rows, sizes.head_dim)
  row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
  for i, vectors in enumerate(refs.vectors[1:]):
    rows = vectors[0].astype(jnp.float32)
    is_int8 = tiles.dtype == jnp.int8
    if is_int8:
      rows = slots_lib.quantize(rows)[0].astype(jnp.float32)
    for k in range(sizes.num_kv_heads):
      at = refs.slot[0, 0, k] & (sizes.tile_rows - 1)
      kept = tiles[i, k].astype(jnp.float32)
      merged = jnp.where(row == at, rows[k : k + 1], kept)
      tiles[i, k] = merged.astype(tiles.dtype)


def _start_reads(sizes, refs, sequence) -> None:
  """Asks for the rows around each slot."""
  for near, far in _rows_around(sizes, refs, sequence):
    pltpu.make_async_copy(far, near, refs.scratch.reads).start()


def _start_writes(sizes, refs, sequence) -> None:
  """Sends them back."""
  for near, far in _rows_around(sizes, refs, sequence):
    pltpu.make_async_copy(near, far, refs.scratch.writes).start()


def _await(tiles, semaphore) -> None:
  """Waits for all of them, which is a matter of bytes alone."""
  pltpu.make_async_copy(tiles, tiles, semaphore).wait()


def _rows_around(sizes, refs, sequence) -> list[tuple[Any, Any]]:
  """In VMEM and in HBM."""
  rows, pairs = sizes.tile_rows, []
  for k in range(sizes.num_kv_heads):
    first = pl.multiple_of(refs.slot[0, 0, k] & -rows, rows)
    for i, stored in enumerate(refs.new_stored):
      far = stored.at[sequence, k, pl.ds(first, rows)]
      pairs.append((refs.scratch.tiles.at[i, k], far))
  return pairs


def _stored_rows(rows, refs) -> Any:
  """New rows as they will be read again: rounded."""
  dtype = refs.stored[0].dtype
  if dtype != jnp.int8:
    return rows.astype(dtype).astype(jnp.float32)
  steps, scale = slots_lib.quantize(rows)
  return steps.astype(jnp.float32) * scale[:, None]


def _product_type(refs) -> Any:
  """float32 where either side is."""
  types = (refs.vectors[0].dtype, refs.stored[0].dtype)
  return jnp.float32 if jnp.float32 in types else jnp.bfloat16


def _lanes(sizes, index, chunk) -> Any:
  """The slots of a chunk; all of them need not be whole registers."""
  if chunk == sizes.capacity:
    return pl.ds(0, chunk)
  return pl.ds(pl.multiple_of(index * chunk, chunk), chunk)


def _heads(sizes, k) -> slice:
  """The query heads of a key head."""
  return slice(k * sizes.num_groups, (k + 1) * sizes.num_groups)


def _by_sequence(array: Any, **options: Any) -> pl.BlockSpec:
  """All of a sequence."""
  zeros = (0,) * (array.ndim - 1)
  block = (1, *array.shape[1:])
  return pl.BlockSpec(block, lambda b, c, _: (b, *zeros), **options)


def _sizes_of(query: Any, cache: slots_lib.Slots) -> Sizes:
  types = (jnp.float32, jnp.bfloat16)
  if query.dtype not in types or cache.key.dtype not in (*types, jnp.int8):
    raise ValueError(
        f"query is {query.dtype} and the cache {cache.key.dtype}; the TPU"
        " kernel takes float32 and bfloat16, and of the cache also int8"
    )
  batch, num_heads, head_dim = query.shape
  return Sizes(
      batch,
      num_heads,
      cache.pos.shape[1],
      cache.capacity,
      head_dim,
      query.dtype.itemsize,
      cache.key.dtype.itemsize,
  )


def _limit() -> int:
  """Bytes of VMEM that a kernel here may take."""
  return tpu_layout.tpu_info().vmem_capacity_bytes * 15 // 16


def _cost(sizes: Sizes) -> pl.CostEstimate:
  shape = shapes.Shape(**{
      name: getattr(sizes, name)
      for name in (
          "batch",
          "num_heads",
          "num_kv_heads",
          "capacity",
          "head_dim",
      )
  })
  work = cost.step(
      shape, itemsize=sizes.itemsize, cache_itemsize=sizes.cache_itemsize
  )
  return pl.CostEstimate(**dataclasses.asdict(work))
