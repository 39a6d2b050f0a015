import functools
from unittest import mock

from absl.testing import absltest
import numpy as np
import pytest

from joma.studies.theorems import invariants
from joma.theory import dynamics
from joma.theory import invariants as laws
from scansnap_jax.experiment import errors

_CONFIG = invariants.InvariantsConfig(step_sizes=(2e-3, 1e-2), num_queries=(1,))


@functools.cache
def _summary():
  return invariants.measure(_CONFIG)


class MeasureTest(absltest.TestCase):

  @pytest.mark.slow
  def test_every_law_is_first_order(self):
    summary = _summary()
    self.assertEqual(summary["step_sizes"], [1e-2, 2e-3])
    # Kinds of attention and activations; `invariants` has three queries.
    self.assertLen(summary["laws"], 3 * len(dynamics.ACTIVATIONS))
    orders = invariants.fitted_orders(summary["step_sizes"], summary["laws"])
    np.testing.assert_allclose(orders, 1, atol=0.05)
    self.assertLess(
        max(row["relative_error"][-1] for row in summary["laws"]), 2e-3
    )
    self.assertIn("falls in proportion to the step", summary["finding"])

  @pytest.mark.slow
  def test_printed_softmax_law_is_an_approximation(self):
    for row in _summary()["printed"]:
      self.assertGreater(row["printed_relative_error"], 0.05)
      self.assertGreater(row["printed_correlation"], 0.9)

  @pytest.mark.slow
  def test_rates_and_temperature_enter_as_a_factor(self):
    for row in _summary()["factors"]:
      factor = row["rate_ratio"] / row["temperature"]
      # First order in the step.
      self.assertAlmostEqual(row["slope_without"], factor, delta=5e-3 * factor)
      self.assertAlmostEqual(row["slope_with"], 1, delta=5e-3)
      self.assertLess(row["relative_error_with"], 5e-3)

  @pytest.mark.slow
  def test_finding_says_so_if_a_law_is_wrong(self):
    rows = [
        {**row, "relative_error": [0.3, 0.29]} for row in _summary()["laws"]
    ]
    finding = invariants._finding({**_summary(), "laws": rows})
    self.assertIn("does not follow the step", finding)

  def test_blow_up_is_the_users_to_mend(self):
    missing = laws.InvariantCheck(*[np.array([np.nan] * 5)] * 3)
    with mock.patch.object(
        invariants, "_check_all", lambda *_: {"law": [missing]}
    ):
      with self.assertRaisesRegex(errors.UserError, "within time=0.5"):
        invariants.measure(_CONFIG)


if __name__ == "__main__":
  absltest.main()
