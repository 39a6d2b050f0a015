from absl.testing import absltest
import numpy as np

from joma.inference.explore import levels


class LevelsTest(absltest.TestCase):

  def test_a_weight_is_at_most_half_a_step_off(self):
    weights = np.geomspace(levels.LEAST * 1.0001, 1, 5001)
    error = np.abs(levels.decode(levels.encode(weights)) / weights - 1)
    self.assertLessEqual(error.max(), levels.ERROR * 1.0001)
    self.assertGreater(error.max(), 0.95 * levels.ERROR)
    self.assertAlmostEqual(levels.ERROR, 0.0175, delta=1e-4)

  def test_every_level_is_itself_and_those_at_the_ends_are_known(self):
    all_levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(
        levels.encode(levels.decode(all_levels)), all_levels
    )
    # 2^(-254 / 20) = 1.5e-4.
    np.testing.assert_allclose(
        levels.decode(np.array([0, 1, 235, 255], np.uint8)),
        [0, 1.503e-4, 0.5, 1],
        rtol=1e-3,
    )
    self.assertEqual(levels.encode(np.array([levels.LEAST * 0.999])), 0)


if __name__ == "__main__":
  absltest.main()
