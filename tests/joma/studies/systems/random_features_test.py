from absl.testing import absltest
import numpy as np
import pytest

from joma.studies.systems import random_features
from tests.joma.studies.systems import small


class RandomFeaturesTest(absltest.TestCase):

  @pytest.mark.slow
  def test_runs_and_is_drawn(self):
    summary = small.measured("random_features")
    self.assertLess(summary["descent"], 1e-6)
    self.assertEqual(summary["claims"][0]["it"], "holds")
    average = summary["errors"]["average"]
    self.assertLess(
        average["attention"]["400"]["mean"],
        average["network"]["400"]["mean"] / 2,
    )
    figure, texts = small.drawn("random_features")
    self.assertLen(figure.axes, 2)
    self.assertContainsSubset(["average", "biased attention"], texts)

  def test_targets_are_what_their_names_say(self):
    query, keys = np.array([[1.0, 2.0]]), np.array([[[1.0, 0.0], [0.0, 3.0]]])
    found = [
        random_features.answers(target, query, keys, np.array([0.6, 0.8]))[0]
        for target in random_features.TARGETS
    ]
    average = (0.6**2 + 2.4**2) / 2
    correlation = (1**3 * 0.6 + 6**3 * 2.4) / 2
    np.testing.assert_allclose(found, [average, correlation])


if __name__ == "__main__":
  absltest.main()
