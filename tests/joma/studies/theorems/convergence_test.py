import math

from absl.testing import absltest
import numpy as np
import pytest

from joma.studies.theorems import convergence


class MeasureTest(absltest.TestCase):

  @pytest.mark.slow
  def test_ratios_and_lambda_tend_to_their_limits(self):
    rows = []
    summary = convergence.measure(
        convergence.ConvergenceConfig(num_times=6),
        on_metrics=lambda *row: rows.append(row),
    )
    np.testing.assert_allclose(
        summary["ratio_limit"], [math.exp(2.5), math.exp(1.5)]
    )
    # Reference: an independent integration in log space in NumPy.
    np.testing.assert_allclose(
        summary["ratio"][-1], [12.193966256770, 4.475912409098], rtol=1e-8
    )
    np.testing.assert_allclose(
        summary["lambda"][-1], summary["lambda_limit"], atol=1e-6
    )
    gaps = summary["log_inverse_gap"]
    self.assertEqual(gaps["with"].shape, (6, 3))
    # e^{mu^2 / 2} per unit of time against 1.
    np.testing.assert_allclose(
        gaps["with"][-1] / 256 / np.exp([4.5, 2, 0.5]), 1, atol=0.02
    )
    np.testing.assert_allclose(gaps["without"][-1] / 256, 1, atol=1e-3)
    self.assertIn("reach their limits", summary["finding"])
    self.assertLen(rows, 6)

  @pytest.mark.slow
  def test_finding_says_so_if_it_is_too_early(self):
    config = convergence.ConvergenceConfig(num_times=2, end_time=0.5)
    self.assertIn("still far", convergence.measure(config)["finding"])


if __name__ == "__main__":
  absltest.main()
