import zlib

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from scansnap_jax.experiment import errors
from scansnap_jax.experiment.processes import digest


def _merge(checksums, is_held=None):
  checksums = np.array(checksums, np.uint32)
  held = np.ones(checksums.shape, bool) if is_held is None else is_held
  names = [f"leaf{i}" for i in range(checksums.shape[1])]
  return digest.merge_checksums(names, checksums, np.array(held, bool))


class MergeChecksumsTest(parameterized.TestCase):

  def test_a_shard_has_the_checksum_of_who_holds_it(self):
    found = _merge([[7, 0, 5], [0, 9, 5]], [[1, 0, 1], [0, 1, 1]])
    self.assertEqual(found, [7, 9, 5])

  def test_a_zero_may_be_a_checksum(self):
    self.assertEqual(_merge([[0, 3], [8, 3]], [[1, 1], [0, 1]]), [0, 3])

  @parameterized.parameters(
      ([[1, 2], [1, 3]], "leaf1 .* process 1 "),
      ([[4, 2], [4, 2], [5, 2]], "leaf0 .* process 2 "),
  )
  def test_copies_that_differ_are_not_saved(self, checksums, expected):
    with self.assertRaisesRegex(errors.UserError, expected):
      _merge(checksums)


class IsIntactTest(absltest.TestCase):

  def test_every_shard_must_have_its_checksum(self):
    array = np.arange(6, dtype=np.float32)
    shards = [
        [[[start, start + 3]], zlib.crc32(array[start : start + 3].tobytes())]
        for start in (0, 3)
    ]
    self.assertTrue(digest.is_intact(array, {"shards": shards}))
    for damaged in (1, 4):
      other = array.copy()
      other[damaged] += 1
      self.assertFalse(digest.is_intact(other, {"shards": shards}))


if __name__ == "__main__":
  absltest.main()
