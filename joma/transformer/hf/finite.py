"""NaN and infinities among numbers, found as fast as memory is read.

A float is one of them where all bits of its exponent are 1. Its other bits are
put behind a comparison of whole numbers: without the sign, what is at least the
pattern of infinity. numpy's `isfinite` has no vectors for bfloat16 and writes a
byte a number. Imports no jax.
"""

import ml_dtypes
import numpy as np

# Numbers that are looked at together: they stay in the cache.
_CHUNK = 2**16


def first_other(array: np.ndarray) -> int | None:
  """Returns where the first number is that is NaN or infinite.

  Args:
    array: Of floats of 2, 4 or 8 bytes, contiguous.

  Returns:
    Its place in the flat array; None if there is none.
  """
  kind = np.dtype(f"u{array.dtype.itemsize}")
  infinity = np.array(np.inf, array.dtype).view(kind)
  # All bits but the sign: the largest whole number with one bit less.
  rest = kind.type(np.iinfo(kind).max // 2)
  flat = array.reshape(-1).view(kind)
  without_sign = np.empty(min(_CHUNK, flat.size), kind)
  for start in range(0, flat.size, _CHUNK):
    part = flat[start : start + _CHUNK]
    bits = np.bitwise_and(part, rest, out=without_sign[: part.size])
    if bits.max() >= infinity:
      return start + int(np.argmax(bits >= infinity))
  return None


def is_narrower(kind: np.dtype, than: np.dtype) -> bool:
  """Whether numbers that one dtype holds are infinite in another."""
  largest = lambda dtype: float(ml_dtypes.finfo(dtype).max)
  return largest(kind) < largest(than)
