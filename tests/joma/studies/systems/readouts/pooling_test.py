from absl.testing import absltest
import jax
import numpy as np
import pytest

from joma.studies.systems.readouts import pooling
from tests.joma.studies.systems import small


class PoolingTest(absltest.TestCase):

  @pytest.mark.slow
  def test_runs_and_is_drawn(self):
    summary = small.measured("pooling")
    self.assertLen(summary["claims"], 5)
    figure, texts = small.drawn("pooling")
    self.assertLen(figure.axes, 2)
    self.assertContainsSubset(["layers", "step"], texts)

  def test_a_class_shows_where_it_is_said_to_and_nowhere_else(self):
    config = pooling.PoolingConfig(batch_size=400, num_tokens=3, signal=5.0)
    for place, shown in zip(pooling.PLACES, (1, 4), strict=True):
      problem = pooling.ReadOut(config=config, design="eos", place=place)
      resid, label = map(np.asarray, problem.draw(jax.random.key(0)))
      apart = [
          resid[label == c].mean(axis=0)[..., c]
          - resid[label != c].mean(axis=0)[..., c]
          for c in (0, 1)
      ]
      expected = np.zeros((2, 5, 3))
      expected[:, shown] = 5
      # Noise of variance up to 5 / 16 in means of some 200 texts: .056, and
      # five times that over 30 numbers.
      np.testing.assert_allclose(apart, expected, atol=0.3)


if __name__ == "__main__":
  absltest.main()
