from absl.testing import absltest
import jax
import numpy as np
import pytest

from joma.studies.systems import length
from tests.joma.studies.systems import small


class LengthTest(absltest.TestCase):

  @pytest.mark.slow
  def test_runs_and_is_drawn(self):
    summary = small.measured("length")
    self.assertEqual(summary["lengths"], [8, 16])
    self.assertLen(summary["claims"], 5)
    # The small runs fall to a loss of .5, and no further.
    self.assertEqual(summary["claims"][0]["it"], "FAILED")
    figure, texts = small.drawn("length")
    self.assertLen(figure.axes, 2)
    self.assertContainsSubset(["ssa", "share of right answers"], texts)

  @pytest.mark.slow
  def test_one_token_has_the_key_and_many_share_a_part(self):
    finder = length.Finder(attention=(), config=length.LengthConfig())
    found = jax.tree.map(np.asarray, finder.draw(jax.random.key(0), 6, 64, 16))
    for text in range(6):
      last, needle = int(found.last[text]), int(found.needle[text])
      self.assertBetween(last, 15, 63)
      own = found.parts[:, text, : last + 1]
      same = own == own[:, needle, None]
      self.assertEqual(np.flatnonzero(same.all(0)).tolist(), [needle, last])
      shared = np.delete(same, [needle, last], axis=1).any(axis=0).mean()
      self.assertBetween(shared, 0.2, 0.8)
      values = np.delete(found.value[text, :last], needle)
      self.assertLessEqual(len(set(values.tolist())), 2)


if __name__ == "__main__":
  absltest.main()
