from absl.testing import absltest
import numpy as np

from joma.transformer.training import observe


class SplitTest(absltest.TestCase):

  def test_rows_are_filled_up_with_zeros(self):
    split = observe.split_evenly(np.arange(1, 6), 2)
    np.testing.assert_array_equal(split, [[1, 2], [3, 4], [5, 0]])


if __name__ == "__main__":
  absltest.main()
