"""Rows of int8 as bfloat16 on a TPU v4, whose registers convert neither.

The compiler's own way moves each register through memory to bring four rows,
which share a word, into the order of 32-bit ones. Here bytes stay where they
are: of every 128 rows the first two of each four come first, then the last two.
Logits, or weights, are brought from and into that order instead: a sixty-fourth
as many.
"""

from collections.abc import Callable

import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from kernels_pallas.hardware import tpu_layout

_LANES = tpu_layout.LANES
_HALF = _LANES // 2


def is_needed(rows: Array, dtype: jax.typing.DTypeLike) -> bool:
  """Whether rows [L, H] are to be factors of this type by `widened`."""
  is_narrow = rows.dtype == jnp.int8 and dtype == jnp.bfloat16
  is_old = tpu_layout.tpu_info().generation < 5
  return is_narrow and is_old and rows.shape[0] % _LANES == 0


def widened(rows: Int8[Array, "L H"]) -> Array:
  """The numbers as bfloat16, which is exact, in an order of their own."""
  words = pltpu.bitcast(rows, jnp.int32)
  # A byte to the top, then down with its sign; of the float32 the upper half is
  # all there is.
  byte = lambda i: jax.lax.bitcast_convert_type(
      ((words << (24 - 8 * i)) >> 24).astype(jnp.float32), jnp.int32
  )
  pair = lambda low, high: pltpu.bitcast(
      jax.lax.shift_right_logical(byte(low), jnp.int32(16)) | byte(high),
      jnp.bfloat16,
  )
  # A register of bfloat16 holds two rows a word: bytes 0 and 1, then 2 and 3.
  pairs = pair(0, 1), pair(2, 3)
  firsts = range(0, rows.shape[0] // 2, _HALF)
  return jnp.concatenate([x[i : i + _HALF] for i in firsts for x in pairs])


def in_order(x: Float[Array, "G L"]) -> Float[Array, "G L"]:
  """Lanes in the order of rows, from that of `widened` rows."""
  # Row 4 i + j is at 2 i + j, or 64 + 2 i + j - 2.
  half = lambda lane: (lane & 2) * (_HALF // 2)
  return _gathered(x, lambda lane: half(lane) + (lane >> 2) * 2 + (lane & 1))


def reordered(x: Float[Array, "G L"]) -> Float[Array, "G L"]:
  """Undoes `in_order`."""
  four = lambda lane: (lane & (_HALF - 1)) >> 1
  half = lambda lane: (lane >= _HALF).astype(jnp.int32) * 2
  return _gathered(x, lambda lane: four(lane) * 4 + (lane & 1) + half(lane))


def _gathered(x: Array, source: Callable[[Array], Array]) -> Array:
  """Every 128 lanes from where `source` says."""
  num = x.shape[0]
  if num == 1:  # The compiler has no gather of a single row.
    x = jnp.broadcast_to(x, (8, x.shape[1]))
  lane = jax.lax.broadcasted_iota(jnp.int32, (x.shape[0], _LANES), 1)
  lanes, firsts = source(lane), range(0, x.shape[1], _LANES)
  take = lambda i: jnp.take_along_axis(x[:, i : i + _LANES], lanes, axis=1)
  return jnp.concatenate(list(map(take, firsts)), axis=1)[:num]
