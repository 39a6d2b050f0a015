"""A step over coded blocks on Hopper GPUs: codes are read once, as they are.

A block of threads takes a part of the blocks of one key head of a sequence. A
tile of codes, 64 rows of bytes for 128 channels of keys or 128 tokens of
values, becomes numbers of the query's type in shared memory: row r of low codes
is row r, that of high ones row r + 64, each with its scale and offset. The
query heads that share the key are rows of the matrix instruction. XLA attends
to the newest block, which is no code, and joins the parts. No figure of speed
is known yet: the kernel is compiled for the H100 and checked by interpretation.

Letters: B batch, N query heads, K key and value heads, G = N / K, R = B K rows,
M blocks of 128 tokens, H = 128 head size.
"""

from collections.abc import Mapping
import functools
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.decode import gpu_attend
from kernels_pallas.decode import pallas_gpu
from kernels_pallas.decode.coded import codes
from kernels_pallas.hardware import gpu_chip
from kernels_pallas.hardware import gpu_layout
from kernels_pallas.hardware import gpu_math
from kernels_pallas.hardware import gpu_registers
from kernels_pallas.hardware import types as hw_types
from kernels_pallas.transformations import manual_axes

plgpu = gpu_layout.plgpu
# Tokens of a block, and numbers of a head.
_SIZE = 128
_ROWS = gpu_layout.ROWS
_NUM_STAGES = 2
# Below every logit, and finite.
_LOWEST = -1e30

# Out so far, and of each row its largest logit and its sum.
_Sums = tuple[jax.Array, jax.Array, jax.Array]


def lacks(
    query: Float[Array, "B N H"], newest_key: Float[Array, "B K R H"]
) -> str | None:
  """Says what the kernel lacks for such arrays; None if nothing."""
  reason = gpu_chip.why_not_type(query.dtype)
  if reason is not None:
    return reason
  num_kv_heads, size, head_dim = newest_key.shape[1:]
  if (size, head_dim) != (_SIZE, _SIZE):
    return (
        f"blocks of {size} tokens and heads of {head_dim}: the GPU kernel takes"
        f" {_SIZE} and {_SIZE}"
    )
  if newest_key.dtype != query.dtype:
    return (
        f"the GPU kernel takes keys of the query's type, {query.dtype}, not"
        f" {newest_key.dtype}"
    )
  if query.shape[1] // num_kv_heads > _ROWS:
    return (
        f"the GPU kernel takes up to {_ROWS} query heads a key head, not"
        f" {query.shape[1] // num_kv_heads}"
    )
  return None


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
    ValueError: If blocks, heads or types are none that the kernel takes.
  """
  reason = lacks(query, newest_key)
  if reason is not None:
    raise ValueError(reason)
  batch, num_kv_heads = newest_key.shape[:2]
  grouped = query.reshape(batch, num_kv_heads, -1, _SIZE)
  parts = _coded(grouped, keys, values, positions, scale)
  newest = _newest(grouped, newest_key, newest_value, positions, scale)
  out, lse = (
      jnp.concatenate(both, axis=2) for both in zip(parts, newest, strict=True)
  )
  shares = jnp.exp2(lse - lse.max(axis=2, keepdims=True))
  total = shares.sum(axis=2)[..., None]
  found = (shares[..., None] * out.astype(jnp.float32)).sum(axis=2) / total
  found = jnp.where((positions >= 0)[:, None, None, None], found, 0)
  return found.reshape(query.shape).astype(query.dtype)


def _newest(
    query: Float[Array, "B K G H"],
    key: Float[Array, "B K R H"],
    value: Float[Array, "B K R H"],
    positions: Int[Array, "B"],
    scale: float,
) -> tuple[Float[Array, "B K 1 G H"], Float[Array, "B K 1 G"]]:
  """Out and lse, in units of log 2, of the block that is not full."""
  products = jnp.einsum(
      "BKGH,BKRH->BKGR", query, key, preferred_element_type=jnp.float32
  )
  seen = jnp.arange(_SIZE)[None] <= positions[:, None] % _SIZE
  logits = gpu_math.log2_logits(products, scale, None)
  logits = jnp.where(seen[:, None, None], logits, _LOWEST)
  highest = logits.max(axis=-1, keepdims=True)
  weights = jnp.exp2(logits - highest)
  total = weights.sum(axis=-1, keepdims=True)
  out = jnp.einsum(
      "BKGR,BKRH->BKGH",
      (weights / total).astype(value.dtype),
      value,
      preferred_element_type=jnp.float32,
  )
  return out[:, :, None], (highest + jnp.log2(total))[:, :, None, :, 0]


def _coded(
    query: Float[Array, "B K G H"],
    keys: codes.Blocks,
    values: codes.Blocks,
    positions: Int[Array, "B"],
    scale: float,
) -> tuple[Float[Array, "B K parts G H"], Float[Array, "B K parts G"]]:
  """Out and lse of parts of the full blocks, -inf where there is none."""
  batch, num_kv_heads, num_groups, _ = query.shape
  num_blocks = keys.data.shape[1]
  wanted = pallas_gpu.choose_parts(batch, num_kv_heads, num_blocks * _SIZE)
  per = -(-num_blocks // wanted)
  num_parts = -(-num_blocks // per)
  rows = batch * num_kv_heads
  copied = num_groups + -num_groups % 8
  # Bytes with a sign are what the hardware widens; the codes are the same bits.
  signed = lambda x: lax.bitcast_convert_type(x, jnp.int8)
  array = manual_axes.struct
  results = gpu_layout.launch(
      functools.partial(
          _kernel, scale=scale, num_kv_heads=num_kv_heads, per=per
      ),
      "coded_decode",
      {
          "query": gpu_attend.padded(
              query.reshape(rows, num_groups, _SIZE), 1, _ROWS
          ),
          "num_full": jnp.maximum(positions, 0) // _SIZE,
          "keys": signed(keys.data),
          "values": signed(values.data),
          "key_scales": keys.scale,
          "key_offsets": keys.offset,
          "value_scales": values.scale,
          "value_offsets": values.offset,
      },
      {
          "out": array((rows, num_parts, copied, _SIZE), query.dtype),
          "lse": array((rows, num_parts, _ROWS), jnp.float32),
      },
      _scratch(query.dtype, keys.scale.dtype),
      {"row": rows, "part": num_parts},
      0,
  )
  split = lambda x: x.reshape(batch, num_kv_heads, *x.shape[1:])
  out, lse = split(results["out"]), split(results["lse"])
  return out[..., :num_groups, :], lse[..., :num_groups]


_TILES = ("keys", "values")
_OF_ROWS = ("key_scales", "key_offsets", "value_scales", "value_offsets")


def _scratch(dtype: jnp.dtype, scale_dtype: jnp.dtype) -> dict[str, Any]:
  """Shared memory by name: a ring of codes and a tile of what they mean."""
  buffer = gpu_attend.tile_buffer
  ring = {
      name: buffer((_NUM_STAGES, _SIZE // 2, _SIZE), jnp.int8)
      for name in _TILES
  }
  vectors = {
      name: plgpu.SMEM((_NUM_STAGES, _SIZE), scale_dtype) for name in _OF_ROWS
  }
  num_copies = len(ring) + len(vectors)
  return {
      **{f"ring_{name}": x for name, x in (ring | vectors).items()},
      "query_tile": buffer((_ROWS, _SIZE), dtype),
      "wide": buffer((_SIZE, _SIZE), dtype),
      "made_lse": plgpu.SMEM((_ROWS,), jnp.float32),
      "query_ready": plgpu.Barrier(),
      "ready": plgpu.Barrier(num_arrivals=num_copies, num_barriers=_NUM_STAGES),
  }


def _kernel(
    refs: Mapping[str, Any],
    scratch: Mapping[str, Any],
    *,
    scale: float,
    num_kv_heads: int,
    per: int,
) -> None:
  """One part of the blocks of one row."""
  row, part = lax.axis_index("row"), lax.axis_index("part")
  sequence, head = lax.div(row, num_kv_heads), lax.rem(row, num_kv_heads)
  low = part * per
  count = jnp.clip(refs["num_full"][sequence] - low, 0, per)
  ready, query = scratch["ready"], scratch["query_tile"]

  def fetch(i: hw_types.Index, slot: hw_types.Index) -> None:
    for name in (*_TILES, *_OF_ROWS):
      plgpu.copy_gmem_to_smem(
          refs[name].at[sequence, low + i, head],
          scratch[f"ring_{name}"].at[slot],
          ready.at[slot],
      )

  for i in range(_NUM_STAGES):
    pl.when(i < count)(functools.partial(fetch, i, i))
  plgpu.copy_gmem_to_smem(refs["query"].at[row], query, scratch["query_ready"])
  plgpu.barrier_wait(scratch["query_ready"])

  def visit(i: jax.Array, carry: _Sums) -> _Sums:
    slot = lax.rem(i, _NUM_STAGES)
    plgpu.barrier_wait(ready.at[slot])
    _widen(scratch, "key", slot)
    products = gpu_registers.product(query, scratch["wide"])
    logits = gpu_math.log2_logits(products, scale, None)
    weights, correction, highest, total = gpu_math.online_softmax(
        logits, *carry[1:]
    )
    _widen(scratch, "value", slot)
    out = carry[0] * gpu_math.along(correction, carry[0].shape, 0)
    weights = weights.astype(query.dtype)
    out = gpu_registers.accumulate(out, weights, scratch["wide"])
    plgpu.commit_smem()  # Ordinary reads come before TMA writes anew.
    pl.when(i + _NUM_STAGES < count)(lambda: fetch(i + _NUM_STAGES, slot))
    return out, highest, total

  begin = (
      gpu_registers.filled((_ROWS, _SIZE), 0.0),
      gpu_registers.filled((_ROWS,), _LOWEST),
      gpu_registers.filled((_ROWS,), 0.0),
  )
  out, highest, total = lax.fori_loop(0, count, visit, begin)
  divisor = jnp.where(total > 0, total, 1.0)
  out = out / gpu_math.along(divisor, out.shape, 0)
  copied = refs["out"].shape[2]
  gpu_attend.write(query, out, refs["out"].at[row, part], copied)
  lse = highest + jnp.log(divisor) * gpu_math.LOG2_E
  lse = jnp.where(total > 0, lse, -jnp.inf)
  gpu_attend.write(scratch["made_lse"], lse, refs["lse"].at[row, part])
  plgpu.wait_smem_to_gmem(0)


def _widen(
    scratch: Mapping[str, hw_types.Ref], what: str, slot: hw_types.Index
) -> None:
  """Writes what a tile of codes means: offset + scale code, a row a scale."""
  ring, wide = scratch[f"ring_{what}s"].at[slot], scratch["wide"]
  # Loaded as wgmma lays out what is twice as wide, as `gpu_attend` does.
  packed = plgpu.load(ring, layout=plgpu.Layout.WGMMA_UPCAST_2X)
  # Bytes know no arithmetic but that of bits: high codes are 16 code - 128.
  low, high = packed & jnp.int8(15), (packed & jnp.int8(-16)) ^ jnp.int8(-128)
  for half, code in enumerate((low, high)):
    code = plgpu.layout_cast(code.astype(wide.dtype), plgpu.Layout.WGMMA)
    code = code.astype(jnp.float32)
    code = (code + 128) * 0.0625 if half else code
    rows = pl.ds(half * _ROWS, _ROWS)
    along = lambda name, code=code, rows=rows: gpu_math.along(
        gpu_registers.load_vector(
            scratch[f"ring_{what}_{name}"].at[slot, rows], 0
        ).astype(jnp.float32),
        code.shape,
        0,
    )
    found = along("offsets") + along("scales") * code
    wide[rows, :] = found.astype(wide.dtype)
  plgpu.commit_smem()
