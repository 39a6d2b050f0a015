import functools
from unittest import mock

from absl.testing import absltest
import numpy as np
import pytest

from joma.studies.theorems import hblt
from joma.theory import cooccurrence

_CONFIG = hblt.HbltConfig(num_depths=4, polarity=(0.8, -0.6), batch_size=20_000)


@functools.cache
def _summary():
  return hblt.measure(_CONFIG)


class MeasureTest(absltest.TestCase):

  def test_theorem_enumeration_and_samples_agree(self):
    summary = _summary()
    self.assertLess(summary["largest_enumeration_error"], 1e-12)
    # Of ten estimates.
    self.assertLess(summary["largest_z_score"], 4)
    for row in summary["rows"]:
      self.assertEqual(row["depths"], [-1, 0, 1, 2, 3])
      self.assertIsNone(row["theorem"][0])
      self.assertAlmostEqual(row["theorem"][-1], 1)
      np.testing.assert_allclose(row["exact"], row["enumerated"], atol=1e-12)
      # A leaf with itself.
      self.assertAlmostEqual(row["sampled"][-1], 1)
      self.assertLess(max(row["sampled_error"]), 0.01)
    self.assertIn("equals enumeration", summary["finding"])
    self.assertIn("samples agree", summary["finding"])
    self.assertIn(": the nearer", summary["finding"])

  @pytest.mark.slow
  def test_finding_says_so_if_the_theorem_is_wrong(self):
    right = cooccurrence.cooccurrence
    with mock.patch.object(
        cooccurrence,
        "cooccurrence",
        lambda rho, rho_0, num_depths, h: right(rho, -rho_0, num_depths, h),
    ):
      self.assertIn("differs from", hblt.measure(_CONFIG)["finding"])

  def test_same_seed_same_samples(self):
    self.assertEqual(hblt.measure(_CONFIG)["rows"], _summary()["rows"])


if __name__ == "__main__":
  absltest.main()
