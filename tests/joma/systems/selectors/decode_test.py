"""A decode step reads as many keys and values at every length."""

from absl.testing import absltest
from absl.testing import parameterized
import pytest

from tests.joma.systems.selectors import taken

_LENGTHS = (4096, 65_536)
_SIZE = 2 * 2 * 8  # Two sequences, two key heads of 8.


class DecodeTest(parameterized.TestCase):

  @parameterized.parameters(
      # Keys that are read, and numbers of a token that are chosen by: means
      # and landmarks, a key a block; index keys, one for both heads.
      ("moba:k=4:block=128", 512, _SIZE / 128),
      ("landmark:k=4:block=128", 512, _SIZE / 128),
      ("indexer:k=512", 512, _SIZE / 2),
      ("indexer:k=512:block=64", 512, _SIZE / 2),
  )
  @pytest.mark.slow
  def test_keys_and_values_are_taken_out_by_the_budget(
      self, entry, budget, chosen_by
  ):
    """Bytes of the compiled step: gathers and slices alone have the caches.

    Dense attention's products have all of them as operands.
    """
    small, large = (taken.taken(entry, length) for length in _LENGTHS)
    for found, length in zip((small, large), _LENGTHS, strict=True):
      self.assertEqual(found.others, {"scatter"})
      self.assertEqual(found.elements, 2 * budget * _SIZE)
      # What else grows with the text is what is chosen by, and its scores.
      self.assertLessEqual(found.largest, 4 * chosen_by * length + 2**16)
    dense = taken.taken("", _LENGTHS[0])
    self.assertIn("dot", dense.others)


if __name__ == "__main__":
  absltest.main()
