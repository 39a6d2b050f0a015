from unittest import mock

from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.studies.theorems import stable_rank
from joma.theory import convergence

_CONFIG = stable_rank.StableRankConfig(num_times=40, num_seeds=3)


class MeasureTest(absltest.TestCase):

  @pytest.mark.slow
  def test_dips_with_attention_and_never_moves_without(self):
    rows = []
    summary = stable_rank.measure(
        _CONFIG, on_metrics=lambda *row: rows.append(row)
    )
    rank, target = summary["with"]["stable_rank"], summary["target"]
    self.assertLess((rank.min(axis=1) / target).max(), 0.8)
    # At t = .01 rows differ by under 5 % from one another's progress, at 10 the
    # last gap is e^{-16}.
    np.testing.assert_allclose(rank[:, 0], target, rtol=0.05)
    np.testing.assert_allclose(rank[:, -1], target, rtol=1e-4)
    bottoms = rank.argmin(axis=1)
    for curve, bottom in zip(rank, bottoms, strict=True):
      self.assertTrue((np.diff(curve[: bottom + 1]) < 0).all())
      self.assertTrue((np.diff(curve[bottom:]) > 0).all())
    still = summary["without"]["stable_rank"]
    np.testing.assert_allclose(still, target[:, None] + 0 * still, rtol=1e-9)
    self.assertIn("dips in 3 of 3", summary["finding"])
    self.assertIn("it does not change", summary["finding"])
    self.assertLen(rows, 40)

  @pytest.mark.slow
  def test_finding_says_so_if_attention_is_frozen(self):
    right = convergence.integrate
    frozen = lambda *arguments, has_attention: right(
        *arguments, has_attention=False
    )
    with mock.patch.object(convergence, "integrate", frozen):
      self.assertIn("dips in 0 of 3", stable_rank.measure(_CONFIG)["finding"])


class IntegrateTest(absltest.TestCase):

  @pytest.mark.slow
  def test_rows_keep_their_direction_and_obey_theorem_4(self):
    with jax.enable_x64(True):
      salience = np.array([3.0, 2, 1.5])
      targets = stable_rank.draw_targets(0, salience, 4)
      times = jnp.array([0.0, 0.1, 0.5, 2.0])
      v = stable_rank.integrate(times, targets)
      gaps = convergence.integrate(times, jnp.asarray(salience), jnp.zeros(3))
      expected = -jnp.expm1(-gaps)[..., None] * targets[None]
      # Along an integrated path: ten times the largest error seen.
      np.testing.assert_allclose(v, expected, atol=1e-8)
      lengths = np.linalg.norm(targets, axis=1)
    np.testing.assert_allclose(lengths, salience, rtol=1e-12)


if __name__ == "__main__":
  absltest.main()
