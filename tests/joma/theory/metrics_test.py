import math

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax.numpy as jnp
import numpy as np

from joma.theory import metrics

# Ten roundings of numbers near 1 in float32.
_ATOL = 1e-6


class AttentionEntropyTest(parameterized.TestCase):

  def test_by_hand(self):
    attn_logits = jnp.log(jnp.array([[1.0, 1, 1, 1], [1, 1e-30, 1e-30, 1]]))
    chex.assert_trees_all_close(
        metrics.attention_entropy(attn_logits + 7),
        jnp.log(jnp.array([4.0, 2.0])),
        atol=_ATOL,
    )


class StableRankTest(parameterized.TestCase):

  def test_by_hand(self):
    # 9 + 4 over 9, whatever the bases.
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
    weights = 3 * np.outer(basis[0], [0, 1, 0]) + 2 * np.outer(
        basis[1], [1, 0, 0]
    )
    stack = jnp.array([weights, np.ones((4, 3)), np.zeros((4, 3))], jnp.float32)
    chex.assert_trees_all_close(
        metrics.stable_rank(stack), jnp.array([13 / 9, 1.0, 0.0]), atol=1e-5
    )


class AgreementTest(parameterized.TestCase):

  def test_scale_and_offset_leave_correlation(self):
    x = jnp.array([1.0, 2.0, 4.0, -3.0])
    y = 5 - 2 * x
    chex.assert_trees_all_close(
        (
            metrics.normalized_correlation(y, x),
            metrics.slope(y, x),
            metrics.slope(x, y),
        ),
        (jnp.array(-1.0), jnp.array(-2.0), jnp.array(-0.5)),
        atol=_ATOL,
    )

  def test_by_hand(self):
    # Without means (1, -1, 0) and (1, 0, -1); |(-1, 0, 2)| over |(2, 0, 1)|.
    y, x = jnp.array([2.0, 0.0, 1.0]), jnp.array([3.0, 2.0, 1.0])
    self.assertAlmostEqual(
        float(metrics.normalized_correlation(y, x)), 0.5, delta=_ATOL
    )
    self.assertAlmostEqual(float(metrics.slope(y, x)), 0.5, delta=_ATOL)
    self.assertAlmostEqual(
        float(metrics.relative_error(y, x)), 1.0, delta=_ATOL
    )

  def test_constants_and_zeros(self):
    x, zeros = jnp.array([1.0, 2.0]), jnp.zeros(2)
    self.assertEqual(metrics.normalized_correlation(x, zeros), 0)
    self.assertEqual(metrics.slope(x, zeros), 0)
    self.assertEqual(metrics.relative_error(zeros, zeros), 0)
    self.assertEqual(metrics.relative_error(x, zeros), 1)
    self.assertTrue(jnp.isinf(metrics.relative_error(zeros, x)))

  def test_nothing_hides_a_missing_number(self):
    x, y = jnp.array([1.0, 2.0, 4.0]), jnp.array([1.0, jnp.nan, 0.0])
    for measure in (
        metrics.normalized_correlation,
        metrics.slope,
        metrics.relative_error,
    ):
      self.assertTrue(jnp.isnan(measure(x, y)), measure.__name__)
      self.assertTrue(jnp.isnan(measure(y, x)), measure.__name__)
    self.assertTrue(jnp.isnan(metrics.stable_rank(jnp.outer(x, y))))


class LatentScoresTest(parameterized.TestCase):

  def test_best_pooled_node_counts(self):
    latents = jnp.array(
        [[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 0, 1], [1, 1, 0, 1]]
    )
    activations = jnp.zeros((4, 3, 3))
    # Node 0 follows latent 0 at varying positions, on top of a constant.
    activations = activations.at[:, 0, 0].set(2.0)
    activations = activations.at[0, 1, 0].set(5.0).at[3, 2, 0].set(5.0)
    # Node 1 is the opposite of latent 1; node 2 never fires.
    activations = activations.at[:, :, 1].set(1.0 - latents[:, None, 1])
    scores = metrics.latent_scores(activations, latents)
    pooled = np.array([5.0, 2, 2, 5])
    expected = [1.0, 0.0, 0.0, 0.0]
    np.testing.assert_allclose(scores.pearson, expected, atol=_ATOL)
    np.testing.assert_allclose(
        scores.cosine[:2],
        [
            10 / math.sqrt(2 * pooled @ pooled),
            7 / math.sqrt(2 * pooled @ pooled),
        ],
        atol=_ATOL,
    )
    np.testing.assert_array_equal(scores.is_used, [True, True, False, False])
    # Over the two in use: not 1 / 4.
    mean = metrics.mean_score(scores.pearson, scores.is_used)
    self.assertAlmostEqual(float(mean), 0.5, delta=_ATOL)

  def test_equals_numpys_correlation(self):
    generator = np.random.default_rng(0)
    activations = np.maximum(generator.normal(size=(50, 4, 6)), 0)
    latents = generator.integers(2, size=(50, 3))
    scores = metrics.latent_scores(
        jnp.asarray(activations), jnp.asarray(latents)
    )
    both = np.corrcoef(activations.max(axis=1), latents, rowvar=False)
    np.testing.assert_allclose(
        scores.pearson, both[:6, 6:].max(axis=0), atol=1e-5
    )

  def test_no_latent_in_use(self):
    mean = metrics.mean_score(jnp.zeros(2), jnp.zeros(2, bool))
    self.assertEqual(mean, 0)


class LargestRiseTest(parameterized.TestCase):

  @parameterized.parameters(
      # Falls for good; rises for good.
      ([3.0, 2.0, 1.0], 0.0, 0.0, 0),
      ([1.0, 2.0, 3.0], 0.0, 2.0, 0),
      # Down 2, up 1, down again.
      ([3.0, 1.0, 2.0, 0.5], 2.0, 1.0, 1),
      # The second rise is the larger one; from the least value so far.
      ([3.0, 2.0, 2.5, 1.0, 2.0], 2.0, 1.0, 3),
      # A rise that stays above an earlier least value is measured from there.
      ([3.0, 1.0, 1.5, 1.2, 1.6], 2.0, 0.6, 1),
      # What comes after a value that is no number does not count.
      ([3.0, 2.0, float("nan"), 9.0], 0.0, 0.0, 0),
  )
  def test_of_a_curve(self, curve, fall, rise, lowest):
    found = metrics.largest_rise(np.array(curve))
    np.testing.assert_allclose(found[:2], (fall, rise), atol=1e-12)
    self.assertEqual(found.lowest, lowest)


if __name__ == "__main__":
  absltest.main()
