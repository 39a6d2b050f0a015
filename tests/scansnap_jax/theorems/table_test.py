from concurrent import futures
import math
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax.numpy as jnp
import pytest

from scansnap_jax.theorems import table

_STATEMENTS = (
    "Lemma 1, gradients",
    "Lemma 1, row sums",
    "Lemma 2, finite T",
    "Lemma 2, scale",
    "Lemma 2, T → ∞",
    "E′, sign",
    "Lemma 3, modified update",
    "Lemma 3, plain gradient",
    "Lemma 5, w_n",
    "Lemma 5, e_n − α_n",
    "Lemma 6, h",
    "Lemma 7, upper",
    "Lemma 7, lower",
    "Lemma 7, first step",
    "Lemma 8, ω₁",
    "Lemma 8, t ≤ t₀′",
    "Lemma 8, t ≥ t₀",
    "Lemma 8, t₀",
    "Lemma 8, t₀′",
    "γ, definition",
    "Lemma 9, t ≤ t₀′",
    "Lemma 9, t ≥ t₀",
    "Lemma 9, t → 0",
    "Lemma 9, t → ∞",
    "γ, peak time",
    "γ, peak closed form",
    "Theorem 1, modified update",
    "Theorem 1, plain gradient",
    "Theorem 1, large overlaps",
    "Theorem 1(a), ξ_n > 0",
    "Theorem 1(a), ξ_n",
    "Corollary 1, number of steps",
    "Corollary 1, ε → 0",
    "Theorem 5, Y",
    "Theorem 5, Θ",
    "Lemma 4, ż_m",
    "Theorem 2(a), distinct tokens",
    "Theorem 2(a), sign",
    "Theorem 2(b), common token",
    "Theorem 2(b), sign",
    "Corollary 2, common tokens",
    "Corollary 2, sign",
    "Corollary 2, norms",
    "Theorem 3, identity",
    "Theorem 3, sandwich",
    "Theorem 3, t → 0",
    "Theorem 3, SGD",
    "Theorem 4, B_n",
    "Theorem 4, scanning",
    "Theorem 4, snapping",
    "Theorem 4, t → 0",
    "Theorem 4, t → ∞",
    "Theorem 4, printed",
    "Theorem 4, B(t₀)",
    "Figure 9, left",
    "Figure 9, right",
    "Figure 9, dots",
)


class CheckAllTest(parameterized.TestCase):

  @pytest.mark.slow  # The main job makes the table, too; .ci/run makes it.
  def test_every_statement_has_a_row_and_holds(self):
    checks = table.check_all()
    self.assertSequenceEqual([check.name for check in checks], _STATEMENTS)
    failed = [check for check in checks if not check.holds]
    self.assertEmpty(failed)
    for check in checks:
      self.assertRegex(check.statement, r": [^:]*\w[^:]*$")
      self.assertNotIn("\n", check.statement)
    # Nothing stays switched to float64.
    self.assertEqual(jnp.zeros(1).dtype, jnp.float32)


class BeginAllTest(parameterized.TestCase):

  def test_a_thread_measures_in_float64_and_in_the_order_of_the_paper(self):
    def width() -> float:
      """Bits of a number."""
      return float(jnp.zeros(1).dtype.itemsize * 8)

    def broken() -> float:
      raise ValueError("no number")

    rows = (
        ("first", width, 64.0),
        ("second", broken, 0.0),
        ("third", width, 1.0),
    )
    with (
        mock.patch.object(table, "_CHECKS", rows),
        futures.ThreadPoolExecutor(1) as pool,
    ):
      first, second, third = table.begin_all(pool)
      # Of that thread alone.
      self.assertEqual(jnp.zeros(1).dtype, jnp.float32)
      self.assertEqual(
          (first.result().name, third.result().name), ("first", "third")
      )
      self.assertEqual(first.result().measured, 64)
      self.assertTrue(first.result().holds)
      self.assertFalse(third.result().holds)
      with self.assertRaisesRegex(ValueError, "no number"):
        second.result()


class HoldsTest(parameterized.TestCase):

  @parameterized.parameters(
      (0.5, 1.0, True),
      (1.0, 1.0, True),
      (1.1, 1.0, False),
      (math.nan, 1.0, False),
      (-math.inf, 1.0, False),
  )
  def test_holds_means_finite_and_within_the_bound(
      self, measured, bound, expected
  ):
    check = table.TheoremCheck("name", "statement", measured, bound)
    self.assertEqual(check.holds, expected)


if __name__ == "__main__":
  absltest.main()
