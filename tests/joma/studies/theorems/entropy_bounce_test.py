from absl.testing import absltest
import numpy as np
import pytest

from joma.studies.theorems import entropy_bounce


class MeasureTest(absltest.TestCase):

  @pytest.mark.slow
  def test_bounces_with_attention_alone(self):
    rows = []
    summary = entropy_bounce.measure(
        entropy_bounce.EntropyBounceConfig(num_times=81),
        on_metrics=lambda *row: rows.append(row),
    )
    with_attention, without = summary["with"], summary["without"]
    for course, last in ((with_attention, 0.3487), (without, 0.3492)):
      self.assertAlmostEqual(course["first"], 1.0986, delta=5e-5)
      self.assertAlmostEqual(course["last"], last, delta=5e-5)
    self.assertAlmostEqual(with_attention["least"], 0.1737, delta=5e-5)
    self.assertAlmostEqual(with_attention["time_of_least"], 0.7)
    self.assertTrue(with_attention["bounces"])
    self.assertFalse(without["bounces"])
    self.assertTrue((np.diff(without["entropy"]) < 0).all())
    self.assertIn("without attention only falls", summary["finding"])
    self.assertIn("rises to 0.3487", summary["finding"])
    self.assertLen(rows, 81)

  def test_finding_follows_the_numbers(self):
    # Ended before the bottom.
    config = entropy_bounce.EntropyBounceConfig(num_times=5, end_time=0.4)
    finding = entropy_bounce.measure(config)["finding"]
    self.assertIn("with attention only falls", finding)


if __name__ == "__main__":
  absltest.main()
