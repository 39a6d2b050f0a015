from absl.testing import absltest
import numpy as np
import pytest

from joma.studies.questions import drift


class MeasureTest(absltest.TestCase):

  @pytest.mark.slow
  def test_a_moving_mean_mends_part_and_the_exact_term_all(self):
    config = drift.DriftConfig(
        num_seeds=2, num_classes=6, hidden_dim=8, num_steps=1600, num_records=4
    )
    summary = drift.measure(config)
    for name, row in summary["rows"].items():
      fixed, moving, exact = (
          row[law]["mean"][-1] for law in ("fixed", "moving", "exact")
      )
      self.assertLess(exact, 0.05, name)
      self.assertLess(10 * exact, moving)
      self.assertLess(moving, fixed)
      share = row["share_mended"]["mean"]
      self.assertBetween(share, 0, 1)
      self.assertGreater(row["drift"]["mean"][-1], 0.02)
    self.assertRegex(summary["finding"], "^The drift of b-bar explains")
    part = dict(mean=0.1, low=0.05, high=0.2)
    rows = {k: r | {"share_mended": part} for k, r in summary["rows"].items()}
    self.assertIn("less than half", drift._finding(rows))
    part = dict(mean=0.9, low=0.8, high=1.0)
    rows = {k: r | {"share_mended": part} for k, r in summary["rows"].items()}
    self.assertIn("most of the printed", drift._finding(rows))


class RelativeDriftTest(absltest.TestCase):

  def test_by_hand(self):
    attended = np.array([[[3.0, 4.0], [3.0, 4.0], [6.0, 0.0]]])
    np.testing.assert_allclose(drift.relative_drift(attended), [[0, 0, 1]])


class RankCorrelationTest(absltest.TestCase):

  def test_by_hand(self):
    rank = lambda *b: drift.rank_correlation(
        np.array([1.0, 2.0, 5.0]), np.array(b)
    )
    self.assertAlmostEqual(rank(0.0, 1.0, 100.0), 1)
    self.assertAlmostEqual(rank(3.0, 2.0, -9.0), -1)
    # Ranks 0, 2, 1 against 0, 1, 2: covariance 1 / 3 over variance 2 / 3.
    self.assertAlmostEqual(rank(0.0, 7.0, 1.0), 0.5)


if __name__ == "__main__":
  absltest.main()
