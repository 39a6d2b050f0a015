"""How long predictors learn; what fitted methods cost is the study's test."""

from absl.testing import absltest
from absl.testing import parameterized

from joma.inference.sparsity.gated import fitted


class NumStepsTest(parameterized.TestCase):

  @parameterized.parameters(
      (0, 300), (300 * 256, 300), (301 * 256, 301), (10**6, 3906)
  )
  def test_all_rows_are_read_once_or_more(self, num_rows, expected):
    self.assertEqual(fitted.num_steps(num_rows), expected)


if __name__ == "__main__":
  absltest.main()
