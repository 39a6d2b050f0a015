from absl.testing import absltest
import numpy as np

from joma.studies import study


class EmitTest(absltest.TestCase):

  def test_streams_a_row_a_time(self):
    rows = []
    curves = {"a": np.array([2.0, 4.0])}
    study.emit(lambda *row: rows.append(row), np.array([0, 10]), curves)
    self.assertEqual(rows, [(0, {"a": 2.0}), (10, {"a": 4.0})])
    study.emit(None, np.array([0]), {"a": np.array([1.0])})


if __name__ == "__main__":
  absltest.main()
