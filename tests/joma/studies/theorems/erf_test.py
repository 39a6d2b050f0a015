import math
from unittest import mock

from absl.testing import absltest
import numpy as np
import pytest

from joma.studies.theorems import erf
from joma.theory import winner

_CONFIG = erf.ErfConfig(num_times=8)
# Along an integrated path: ten times the largest error seen.
_ATOL = 1e-8


class MeasureTest(absltest.TestCase):

  def test_constant_blow_up_and_frozen_values(self):
    rows = []
    summary = erf.measure(_CONFIG, on_metrics=lambda *row: rows.append(row))
    self.assertLess(summary["largest_error"], _ATOL)
    self.assertAlmostEqual(
        summary["blow_up_time"]["measured"], math.sqrt(math.pi / 2), delta=_ATOL
    )
    # sqrt 2 erfinv(.8), (.5), (.1): quantiles of the normal distribution.
    np.testing.assert_allclose(
        summary["frozen"]["measured"],
        [1.2815515655, 0.6744897502, 0.1256613469],
        atol=_ATOL,
    )
    np.testing.assert_allclose(summary["ratio"][-1], 0.98, atol=_ATOL)
    np.testing.assert_allclose(
        summary["ratio_of_halves"][-1],
        [0.900025, 0.772935, 0.717381, 0.693839],
        atol=1e-6,
    )
    self.assertIn("with v/√2 holds", summary["finding"])
    self.assertIn("factor 1.30", summary["finding"])
    self.assertLen(rows, 8)

  @pytest.mark.slow
  def test_signs_do_not_matter(self):
    summary = erf.measure(erf.ErfConfig(delta=(0.3, -2.0), num_times=4))
    self.assertLess(summary["largest_error"], _ATOL)
    self.assertLess(summary["v"][-1, 1], -2)

  def test_finding_says_so_if_the_law_is_wrong(self):
    right = winner.erf_ratio
    with mock.patch.object(
        winner, "erf_ratio", lambda v, delta: right(v / math.sqrt(2), delta)
    ):
      finding = erf.measure(_CONFIG)["finding"]
    self.assertIn("with v/√2 fails", finding)


if __name__ == "__main__":
  absltest.main()
