import base64
import zlib

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from joma.inference.explore import levels
from joma.inference.explore import streams
from tests.joma.inference.explore import synthetic


class StreamsTest(parameterized.TestCase):

  def test_a_stream_is_the_map_within_half_a_level(self):
    found, maps = synthetic.make()
    packed = streams.pack(found, 1e9)
    self.assertEqual(packed.least_level, 1)
    for index, stream in enumerate(packed.heads):
      at = divmod(index, 3)
      read = streams.unpack(stream, 40, 2)
      is_large = maps[at] >= levels.LEAST
      np.testing.assert_allclose(
          read["weights"][is_large],
          maps[at][is_large],
          rtol=levels.ERROR * 1.0001,
      )
      self.assertEqual(read["weights"][~is_large].max(), 0)
      mean = found.attention.received[at] / 40
      np.testing.assert_allclose(
          read["received"], mean, rtol=levels.ERROR * 1.0001, atol=levels.LEAST
      )
      np.testing.assert_allclose(
          read["shares"], found.attention.shares[:, *at], atol=0.5001 / 255
      )
      sinks, heavy = found.attention.sinks()[at], found.attention.heavy()[at]
      np.testing.assert_array_equal(read["marks"], sinks + 2 * heavy)

  @parameterized.parameters((40, 5), (300, 17))
  def test_what_is_not_stored_is_in_the_rest(self, num_tokens, num_entries):
    found, _ = synthetic.make(1, 2, 1, num_tokens, num_entries)
    for index, stream in enumerate(streams.pack(found, 1e9).heads):
      read = streams.unpack(stream, num_tokens, 2)
      weights = found.attention.weights[0, index]
      stored = np.where(weights >= levels.LEAST, weights, 0).sum(axis=1)
      np.testing.assert_allclose(
          read["rests"], 1 - stored, rtol=0.018, atol=2 * levels.LEAST
      )
      counts = (read["weights"] > 0).sum(axis=1)
      np.testing.assert_array_equal(counts, (weights >= levels.LEAST).sum(1))

  def test_a_small_page_has_all_weights_above_one_bound(self):
    found, maps = synthetic.make(1, 4, 4, 120)
    whole = sum(map(len, streams.pack(found, 1e9).heads))
    packed = streams.pack(found, whole / 2)
    self.assertLess(sum(map(len, packed.heads)), whole / 2)
    self.assertGreater(sum(map(len, packed.heads)), whole / 4)
    bound = levels.decode(np.uint8([packed.least_level]))
    for index, stream in enumerate(packed.heads):
      stored = streams.unpack(stream, 120, 2)["weights"] > 0
      one = maps[0, index]
      self.assertTrue(stored[one > bound * (1 + levels.ERROR)].all())
      self.assertFalse(stored[one < bound * (1 - levels.ERROR)].any())

  def test_when_tokens_left_is_exact(self):
    found, _ = synthetic.make(2, 4, 2, 300, 3)
    packed = streams.pack(found, 1e9)
    for policy, stream in zip(found.policies, packed.left_at, strict=True):
      data = zlib.decompress(base64.b64decode(stream))
      low, high = np.frombuffer(data, np.uint8).astype(int).reshape(2, -1)
      left_at = (low + 256 * high).reshape(2, 2, 300)
      np.testing.assert_array_equal(left_at, policy.left_at)

  def test_a_picture_has_the_largest_weight_of_each_part(self):
    found, maps = synthetic.make(1, 1, 1, 64)
    packed = streams.pack(found, 1e9)
    data = zlib.decompress(base64.b64decode(packed.pictures))
    picture = np.frombuffer(data, np.uint8).reshape(32, 32)
    parts = maps[0, 0].reshape(32, 2, 32, 2).max(axis=(1, 3))
    np.testing.assert_array_equal(picture, levels.encode(parts))


if __name__ == "__main__":
  absltest.main()
