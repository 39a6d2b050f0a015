from absl.testing import absltest
import numpy as np
import pytest

from launch.bench.recurrent import linear


class LinearTest(absltest.TestCase):

  def test_the_slope_is_the_power(self):
    lengths = [4096, 8192, 65_536]
    for power in (1.0, 2.0):
      seconds = 3e-9 * np.array(lengths) ** power
      self.assertAlmostEqual(linear.slope(lengths, seconds), power, places=6)

  def test_what_it_cannot_say_is_refused(self):
    with self.assertRaisesRegex(ValueError, "knows cpu, not tpu:v5e"):
      linear.report("tpu:v5e", [1024, 2048])
    with self.assertRaisesRegex(ValueError, "two lengths or more, got .1024"):
      linear.report("cpu", [1024])

  @pytest.mark.slow
  def test_time_grows_as_the_text_does(self):
    """Within .15 of it, from 4k to 64k; three rounds, as others may run."""
    lengths = [4096, 8192, 16_384, 32_768, 65_536]
    rows = linear.report("cpu", lengths, num_times=3)
    self.assertEqual([row["length"] for row in rows], lengths)
    for name in ("forward_s", "backward_s"):
      found = linear.slope(lengths, [row[name] for row in rows])
      self.assertLess(found, 1.15, name)


if __name__ == "__main__":
  absltest.main()
