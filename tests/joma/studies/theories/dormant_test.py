from absl.testing import absltest
import numpy as np

from joma.studies.theories import dormant
from tests.joma.studies.theories import small


class FlowTest(absltest.TestCase):

  def test_velocity_is_minus_the_gradient(self):
    def loss(z, first, others):
      p = 1 / (1 + np.exp(-z))
      return (p * first + (1 - p) * others) ** 2 / 2

    state = np.array([0.7, -0.3, 1.4])
    slope = [
        (loss(*(state + step)) - loss(*(state - step))) / 2e-6
        for step in 1e-6 * np.eye(3)
    ]
    found = dormant.velocity(state, (1, 1))
    np.testing.assert_allclose(found, -np.array(slope), rtol=1e-8)
    frozen = dormant.velocity(state, (0, 1))
    np.testing.assert_allclose(frozen, found * [0, 1, 1], rtol=1e-12)

  def test_the_flow_is_that_of_many_small_steps(self):
    config = dormant.DormantConfig(end_time=1e3, num_times=5)
    for regime, trained in dormant.REGIMES.items():
      found = dormant.flow(config, 3, regime)
      ends, state = dormant.times(config), found[0]
      step = (ends[2] - ends[0]) / 5000  # By the midpoint of each.
      for _ in range(5000):
        half = state + step / 2 * dormant.velocity(state, trained)
        state = state + step * dormant.velocity(half, trained)
      np.testing.assert_allclose(found[2], state, atol=1e-6)


class StudyTest(absltest.TestCase):

  def test_runs_and_is_drawn(self):
    summary = small.measured("dormant")
    self.assertLen(summary["claims"], 4)
    figure, texts = small.drawn("dormant")
    self.assertLen(figure.axes, 2)
    self.assertContainsSubset(["logits alone", "both", "time"], texts)


if __name__ == "__main__":
  absltest.main()
