from absl.testing import absltest
import jax
import numpy as np
import pytest

from joma.studies.systems import mqar
from tests.joma.studies.systems import small


class MqarTest(absltest.TestCase):

  @pytest.mark.slow
  def test_runs_and_is_drawn(self):
    summary = small.measured("mqar")
    verdicts = [row["it"] for row in summary["claims"]]
    # Of models that answer half of the keys, and are not trained; all keys of
    # so short texts are near.
    self.assertLen(verdicts, 3)
    self.assertEqual((verdicts[0], verdicts[2]), ("FAILED", "holds"))
    figure, texts = small.drawn("mqar")
    self.assertLen(figure.axes, 1)
    self.assertContainsSubset(["softmax + conv", "step"], texts)

  @pytest.mark.slow
  def test_each_key_is_asked_once_after_all_pairs(self):
    task = mqar.Pairs(seq_len=24, num_pairs=3, num_keys=5, num_values=7)
    found = task.draw(jax.random.key(0), 4)
    away = np.asarray(mqar.distances(found, 3))
    tokens, targets, is_asked, _ = map(np.asarray, found)
    for row in range(4):
      keys, values = tokens[row, :6:2].tolist(), tokens[row, 1:6:2].tolist()
      self.assertTrue(all(5 <= value < 12 for value in values))
      places = np.flatnonzero(is_asked[row])
      self.assertEqual(sorted(tokens[row, places]), sorted(keys))
      self.assertGreaterEqual(places.min(), 6)
      for place in places:
        pair = keys.index(tokens[row, place])
        self.assertEqual(targets[row, place], values[pair])
        self.assertEqual(away[row, place], place - 2 * pair)
      rest = np.setdiff1d(np.arange(6, 24), places)
      np.testing.assert_array_equal(tokens[row, rest], 12)


if __name__ == "__main__":
  absltest.main()
