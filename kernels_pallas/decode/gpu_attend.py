"""Attention of a decode step on Hopper GPUs: each key and value is read once.

A block of threads takes a part of the slots of one key head of a sequence, in
tiles of 64 that are copied a few ahead; the query heads that share the key are
rows of the matrix instruction, which has 64. The softmax is kept as usual, and
the logits, few beside keys of 64 or 128 numbers, are written out: only when all
parts are done is their normaliser known, and with it the scores. int8 is turned
into the type of the query in shared memory; its scales are factors of logits
and of weights.

Letters as in `decode`.
"""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.decode import rule as rule_lib
from kernels_pallas.hardware import gpu_layout
from kernels_pallas.hardware import gpu_math
from kernels_pallas.hardware import gpu_registers
from kernels_pallas.hardware import types as hw_types
from kernels_pallas.transformations import manual_axes

plgpu = gpu_layout.plgpu
# Query heads that share a key, at most, and slots of a tile.
MOST_GROUPS = TILE = gpu_layout.ROWS
HEAD_DIMS = (64, 128)
# Rows that can be cut from a tile in shared memory.
_ROWS_OF_COPY = 8
# Below every logit, and finite: the difference of two of it is 0, not nan.
_LOWEST = -1e30

# Out so far, and of each row its largest logit and its sum.
_Sums = tuple[jax.Array, jax.Array, jax.Array]


class Rows(NamedTuple):
  """The cache, a row for each key head of a sequence.

  Attributes:
    key: [R, C, H], of the query's type or int8.
    value: As key.
    pos: int32 [R, C].
    key_scale: float32 [R, C] with int8, else None.
    value_scale: As key_scale.
  """

  key: jax.Array
  value: jax.Array
  pos: jax.Array
  key_scale: jax.Array | None
  value_scale: jax.Array | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """What is known of a call while it is traced.

  Attributes:
    num_tiles: Tiles of the slots of a row.
    num_parts: None without a tile.
    per: Tiles of a part; the last may have fewer.
    num_stages: Tiles that are in shared memory at once.
    head_dim: H.
    dtype: Of query and products.
    stored: Type of keys and values.
    copied_groups: G, in whole copies.
  """

  num_tiles: int
  num_parts: int
  per: int
  num_stages: int
  head_dim: int
  dtype: jnp.dtype
  stored: jnp.dtype
  copied_groups: int

  @property
  def is_quantized(self) -> bool:
    """Whether keys and values are int8."""
    return self.stored == jnp.int8

  @property
  def smem_bytes(self) -> int:
    """Shared memory of a block."""
    tile = TILE * self.head_dim
    of_slot = 4 * TILE * (3 if self.is_quantized else 1)
    ring = 2 * tile * jnp.dtype(self.stored).itemsize + of_slot
    # Query, logits, their logarithms; of int8 a tile of keys and of values.
    kept = 2 * tile + 4 * TILE * TILE + 4 * TILE
    kept += 4 * tile if self.is_quantized else 0
    return self.num_stages * ring + kept


def attend(
    query: Float[Array, "R G H"],
    rows: Rows,
    positions: Int[Array, "R"],
    rule: rule_lib.Rule,
    *,
    num_parts: int,
    num_stages: int,
) -> tuple[Float[Array, "R parts _ H"], Float[Array, "R parts _"], Array]:
  """Attends from one token of each row to what it sees.

  Args:
    query: bfloat16 or float16; G up to 64, H 64 or 128.
    rows: The cache.
    positions: Of the tokens; -1 sees nothing.
    rule: How.
    num_parts: Parts to aim for.
    num_stages: Tiles that are in shared memory at once.

  Returns:
    Out of each part [R, parts, >= G, H] as of its own softmax, in the query's
    type; the logarithm to base 2 of the softmax's sum [R, parts, 64], -inf
    where a part has nothing to see; and logits / ln 2 [R, >= G, >= C], -inf
    where not seen.

  Raises:
    ValueError: If the tiles do not fit into shared memory.
  """
  num_rows, num_groups, head_dim = query.shape
  # Parts of whole tiles, as equal as can be; none of them may be empty.
  num_tiles = -(-rows.pos.shape[1] // TILE)
  per = -(-num_tiles // num_parts)
  sizes = Sizes(
      num_tiles=num_tiles,
      num_parts=-(-num_tiles // per),
      per=per,
      num_stages=num_stages,
      head_dim=head_dim,
      dtype=query.dtype,
      stored=rows.key.dtype,
      copied_groups=num_groups + -num_groups % _ROWS_OF_COPY,
  )
  gpu_layout.check_smem("heavy_hitter_decode", sizes.smem_bytes, sizes)
  array, heads = manual_axes.struct, sizes.copied_groups
  results = gpu_layout.launch(
      functools.partial(_kernel, rule=rule, sizes=sizes),
      "heavy_hitter_decode",
      {
          "query": padded(query, 1, MOST_GROUPS),
          "positions": positions,
          "key": rows.key,
          "value": rows.value,
          # An empty slot is seen by nobody, nor is one past the end.
          "pos": padded(rows.pos, 1, num_tiles * TILE, -1),
          **_scales(rows, num_tiles * TILE),
      },
      {
          "out": array(
              (num_rows, sizes.num_parts, heads, head_dim), query.dtype
          ),
          "lse": array((num_rows, sizes.num_parts, TILE), jnp.float32),
          "logits": array((num_rows, heads, num_tiles * TILE), jnp.float32),
      },
      _scratch(sizes),
      {"row": num_rows, "part": sizes.num_parts},
      # None beside the warpgroup that orders copies: it computes, too, and
      # another block of the multiprocessor computes while it waits.
      0,
  )
  return results["out"], results["lse"], results["logits"]


def _scales(rows: Rows, num_slots: int) -> dict[str, jax.Array]:
  """Scales of int8 by name; none of other types."""
  scales = {"key_scale": rows.key_scale, "value_scale": rows.value_scale}
  return {
      name: padded(scale, 1, num_slots)
      for name, scale in scales.items()
      if scale is not None
  }


def _scratch(sizes: Sizes) -> dict[str, Any]:
  """Shared memory by name."""
  stages, head_dim = sizes.num_stages, sizes.head_dim
  tile = functools.partial(tile_buffer, (TILE, head_dim))
  ring = functools.partial(tile_buffer, (stages, TILE, head_dim))
  of_slots = lambda dtype: plgpu.SMEM((stages, TILE), dtype)
  scratch = {
      "query": tile(sizes.dtype),
      "made_logits": tile_buffer((TILE, TILE), jnp.float32),
      "made_lse": plgpu.SMEM((TILE,), jnp.float32),
      "query_ready": plgpu.Barrier(),
      "keys": ring(sizes.stored),
      "values": ring(sizes.stored),
      "all_pos": of_slots(jnp.int32),
  }
  num_copies = 3
  if sizes.is_quantized:
    num_copies = 5
    scratch["key_scales"] = of_slots(jnp.float32)
    scratch["value_scales"] = of_slots(jnp.float32)
    scratch["wide_key"] = scratch["wide_value"] = tile(sizes.dtype)
  # One arrival for each copy of a tile: keys, values, positions and two scales.
  ready = plgpu.Barrier(num_arrivals=num_copies, num_barriers=stages)
  return scratch | {"ready": ready}


def tile_buffer(
    shape: tuple[int, ...], dtype: jax.typing.DTypeLike
) -> hw_types.Buffer:
  """Shared memory of tiles [..., rows, columns] that TMA reads or writes."""
  # Swizzled along the 128 bytes of memory's banks, or along a whole row.
  columns = min(shape[-1], 128 // jnp.dtype(dtype).itemsize)
  transforms = (
      plgpu.TilingTransform((8, columns)),
      plgpu.SwizzleTransform(columns * jnp.dtype(dtype).itemsize),
  )
  return plgpu.SMEM(shape, dtype, transforms=transforms)


# Arrays of the cache, and where their tiles arrive.
_RINGS = {
    "key": "keys",
    "value": "values",
    "pos": "all_pos",
    "key_scale": "key_scales",
    "value_scale": "value_scales",
}


def _kernel(
    refs: Mapping[str, Any],
    scratch: Mapping[str, Any],
    *,
    rule: rule_lib.Rule,
    sizes: Sizes,
) -> None:
  """One part of the slots of one row."""
  row, part = lax.axis_index("row"), lax.axis_index("part")
  low = part * sizes.per
  count = jnp.minimum(sizes.num_tiles - low, sizes.per)
  position, ready = refs["positions"][row], scratch["ready"]

  def fetch(i: hw_types.Index, slot: hw_types.Index) -> None:
    slots = pl.ds((low + i) * TILE, TILE)
    for name, ring in _RINGS.items():
      if name in refs:
        plgpu.copy_gmem_to_smem(
            refs[name].at[row, slots], scratch[ring].at[slot], ready.at[slot]
        )

  # The ring is filled before the query is awaited: copies run side by side.
  for i in range(sizes.num_stages):
    pl.when(i < count)(functools.partial(fetch, i, i))
  query = scratch["query"]
  plgpu.copy_gmem_to_smem(refs["query"].at[row], query, scratch["query_ready"])
  plgpu.barrier_wait(scratch["query_ready"])

  def visit(i: jax.Array, carry: _Sums) -> _Sums:
    slot = lax.rem(i, sizes.num_stages)
    plgpu.barrier_wait(ready.at[slot])
    key, value = _factors(scratch, slot, sizes)
    # Logits leave as they are, unnormalised: the sum of all parts is known
    # later.
    logits = _logits(query, key, scratch, slot, position, rule)
    places = pl.ds((low + i) * TILE, TILE)
    write(
        scratch["made_logits"],
        logits,
        refs["logits"].at[row, :, places],
        sizes.copied_groups,
    )
    carry = _summed(carry, logits, value, scratch, slot)
    plgpu.commit_smem()  # Ordinary reads come before TMA writes anew.
    pl.when(i + sizes.num_stages < count)(
        lambda: fetch(i + sizes.num_stages, slot)
    )
    return carry

  begin = (
      gpu_registers.filled((TILE, sizes.head_dim), 0.0),
      gpu_registers.filled((TILE,), _LOWEST),
      gpu_registers.filled((TILE,), 0.0),
  )
  out, highest, total = lax.fori_loop(0, count, visit, begin)
  divisor = jnp.where(total > 0, total, 1.0)
  out = out / gpu_math.along(divisor, out.shape, 0)
  write(query, out, refs["out"].at[row, part], sizes.copied_groups)
  # A part that saw nothing has lse -inf: it then has no share in the whole.
  lse = highest + jnp.log(divisor) * gpu_math.LOG2_E
  lse = jnp.where(total > 0, lse, -jnp.inf)
  write(scratch["made_lse"], lse, refs["lse"].at[row, part])
  plgpu.wait_smem_to_gmem(0)


def _factors(
    scratch: Mapping[str, hw_types.Ref], slot: hw_types.Index, sizes: Sizes
) -> list[hw_types.Ref]:
  """Keys and values of a tile in shared memory, in the type of the query."""
  stored = [scratch[name].at[slot] for name in ("keys", "values")]
  if not sizes.is_quantized:
    return stored
  wide = [scratch["wide_key"], scratch["wide_value"]]
  for narrow, target in zip(stored, wide, strict=True):
    # Loaded as wgmma lays out what is twice as wide: nothing is exchanged
    # between threads.
    steps = plgpu.load(narrow, layout=plgpu.Layout.WGMMA_UPCAST_2X)
    steps = steps.astype(target.dtype)
    target[...] = plgpu.layout_cast(steps, plgpu.Layout.WGMMA)
  plgpu.commit_smem()
  return wide


def _logits(
    query: hw_types.Ref,
    key: hw_types.Ref,
    scratch: Mapping[str, hw_types.Ref],
    slot: hw_types.Index,
    position: jax.Array,
    rule: rule_lib.Rule,
) -> jax.Array:
  """Of a tile, in units of log 2, -inf where not seen."""
  products = gpu_registers.product(query, key.transpose((1, 0)))
  of_slots = lambda name: gpu_math.along(
      gpu_registers.load_vector(scratch[name].at[slot], 1), products.shape, 1
  )
  if "key_scales" in scratch:
    products = products * of_slots("key_scales")
  logits = gpu_math.log2_logits(products, rule.scale, rule.logits_soft_cap)
  is_seen = of_slots("all_pos") >= _first_seen(position, rule)
  return jnp.where(is_seen, logits, -jnp.inf)


def _first_seen(position: jax.Array, rule: rule_lib.Rule) -> jax.Array:
  """The first position that a token sees; an inactive one sees none."""
  first = jnp.int32(0)
  if rule.window is not None:
    first = jnp.maximum(position - (rule.window - 1), 0)
  return jnp.where(position < 0, jnp.iinfo(jnp.int32).max, first)


def _summed(
    carry: _Sums,
    logits: jax.Array,
    value: hw_types.Ref,
    scratch: Mapping[str, hw_types.Ref],
    slot: hw_types.Index,
) -> _Sums:
  """Takes a tile into out, largest logit and sum."""
  out, highest, total = carry
  weights, correction, highest, total = gpu_math.online_softmax(
      logits, highest, total
  )
  out = out * gpu_math.along(correction, out.shape, 0)
  # A value's scale is a factor of its weight, for out alone: the sum of weights
  # and the logits that were written are without it.
  if "value_scales" in scratch:
    scale = gpu_registers.load_vector(scratch["value_scales"].at[slot], 1)
    weights = weights * gpu_math.along(scale, weights.shape, 1)
  weights = weights.astype(value.dtype)
  return gpu_registers.accumulate(out, weights, value), highest, total


def write(
    buffer: hw_types.Ref,
    array: jax.Array,
    target: hw_types.Ref,
    rows: int | None = None,
) -> None:
  """Writes an array, or its first rows, through shared memory."""
  plgpu.wait_smem_to_gmem(0)  # What the buffer had before has been sent.
  buffer[...] = array.astype(buffer.dtype)
  plgpu.commit_smem()
  source = buffer if rows is None else buffer.at[pl.ds(0, rows)]
  plgpu.copy_smem_to_gmem(source, target)


def padded(array: jax.Array, axis: int, size: int, value: int = 0) -> jax.Array:
  """The array with that many entries along an axis."""
  if array.shape[axis] == size:
    return array
  padding = [(0, 0)] * array.ndim
  padding[axis] = (0, size - array.shape[axis])
  return jnp.pad(array, padding, constant_values=value)
