from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from joma.studies import claims
from scansnap_jax.experiment import errors


class FindingTest(absltest.TestCase):

  def test_a_claim_that_fails_is_named_with_what_was_measured(self):
    rows = [
        claims.row("a is small", "below 1", "0.5", True),
        claims.row("b is large", "above 1", "0.25", np.bool_(False)),
    ]
    finding = claims.finding(rows)
    self.assertStartsWith(finding, "1 of 2 claims hold. FAILED: b is large")
    self.assertIn("expected above 1, measured 0.25", finding)
    self.assertStartsWith(claims.finding(rows[:1]), "1 of 1 claims hold.")
    self.assertNotIn("FAILED", claims.finding(rows[:1]))
    self.assertStartsWith(claims.finding([]), "Nothing is claimed")


class FiniteTest(parameterized.TestCase):

  @parameterized.parameters(np.nan, np.inf, -np.inf)
  def test_no_number_may_be_infinite(self, value):
    tree = {"a": [1.0, {"b": np.array([0.0, value])}], "c": "nan", "d": None}
    with self.assertRaisesRegex(errors.UserError, r"study, a\[1\], b\[1\] is"):
      claims.require_finite("study", tree)
    claims.require_finite("study", {"a": np.arange(3), "b": None, "c": True})


if __name__ == "__main__":
  absltest.main()
