"""NaN and infinities are found wherever they are, and nothing else is."""

from absl.testing import absltest
from absl.testing import parameterized
import ml_dtypes
import numpy as np

from joma.transformer.hf import finite

_DTYPES = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)
# Beyond what is looked at together.
_SIZE = 2**16 + 3


class FirstOtherTest(parameterized.TestCase):

  @parameterized.parameters(*_DTYPES)
  def test_the_first_of_every_kind_is_found(self, dtype):
    for place in (0, 77, _SIZE - 1):
      for value in (np.nan, -np.nan, np.inf, -np.inf):
        array = np.ones(_SIZE, dtype)
        array[[place, -1]] = value
        self.assertEqual(finite.first_other(array), place)

  @parameterized.parameters(*_DTYPES)
  def test_the_largest_and_the_least_are_numbers(self, dtype):
    limits = ml_dtypes.finfo(dtype)
    values = [limits.max, limits.min, limits.smallest_subnormal, 0, -0.0]
    self.assertIsNone(finite.first_other(np.array([values], dtype)))
    self.assertIsNone(finite.first_other(np.zeros((0, 3), dtype)))

  def test_which_dtype_holds_less(self):
    narrower = [(a, b) for a in _DTYPES for b in _DTYPES if _is(a, b)]
    half, brain, single, double = _DTYPES
    expected = {(half, brain), (half, single), (half, double)}
    expected |= {(brain, single), (brain, double), (single, double)}
    self.assertEqual(set(narrower), expected)


def _is(kind, than):
  return finite.is_narrower(np.dtype(kind), np.dtype(than))


if __name__ == "__main__":
  absltest.main()
