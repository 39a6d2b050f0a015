"""What the kernels for TPUs compute in a tile, against plain loops."""

from absl.testing import absltest
import jax.numpy as jnp
import numpy as np

from kernels_pallas.hardware import tpu_tile


class AllowedTest(absltest.TestCase):

  def test_a_key_is_read_from_start_to_before_stop(self):
    # Two spans of 128 queries; the tile's first key is key 16.
    rng = np.random.default_rng(0)
    starts = rng.integers(10, 40, size=(2, 128)).astype(np.int32)
    stops = starts + rng.integers(0, 9, size=(2, 128)).astype(np.int32)
    found = tpu_tile.allowed(16, jnp.asarray(starts), jnp.asarray(stops), 16)
    expected = np.zeros((16, 128), bool)
    for key in range(16):
      for query in range(128):
        for start, stop in zip(starts[:, query], stops[:, query], strict=True):
          expected[key, query] |= start <= key + 16 < stop
    np.testing.assert_array_equal(found, expected)
    self.assertBetween(expected.mean(), 0.1, 0.9)


if __name__ == "__main__":
  absltest.main()
