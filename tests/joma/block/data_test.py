from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np

from joma.block import data


class ClassProbsTest(absltest.TestCase):

  def test_distinct_tokens_fall_and_others_are_equal(self):
    probs = data.class_probs(num_classes=2, num_distinct=3, num_common=2)
    # Weights 1.1, .7, .3 in the own class, .1 in the other, 1 for common ones.
    expected = np.array([1.1, 0.7, 0.3, 0.1, 0.1, 0.1, 1, 1]) / 4.4
    np.testing.assert_allclose(probs[0], expected, rtol=1e-6)
    np.testing.assert_allclose(
        probs[1], expected[[3, 4, 5, 0, 1, 2, 6, 7]], rtol=1e-6
    )


class DrawTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.probs = data.class_probs(num_classes=3, num_distinct=4, num_common=1)
    self.key = jax.random.key(0)

  def test_clouds_are_isotropic_around_their_centers(self):
    draw = jax.jit(data.DrawClouds(30_000))
    batch = draw(self.key, data.Clouds(self.probs, np.float32(0.2)))
    rest = np.asarray(batch.counts) - self.probs[batch.label]
    # Four standard errors of 30,000 draws.
    np.testing.assert_allclose(rest.mean(axis=0), 0, atol=0.005)
    covariance = np.cov(rest.T)
    np.testing.assert_allclose(covariance, 0.04 * np.eye(13), atol=0.0013)
    np.testing.assert_array_equal(np.bincount(batch.label), 10_000)

  def test_sequences_have_the_frequencies_of_their_class(self):
    batch = jax.jit(data.DrawSequences(6000, 8))(self.key, self.probs)
    np.testing.assert_allclose(batch.counts.sum(axis=1), 1, rtol=1e-6)
    eighths = np.asarray(batch.counts) * 8
    np.testing.assert_allclose(eighths, eighths.round(), atol=1e-6)
    for label in range(3):
      mean = np.asarray(batch.counts)[np.asarray(batch.label) == label].mean(
          axis=0
      )
      np.testing.assert_allclose(mean, self.probs[label], atol=0.02)

  @parameterized.parameters(True, False)
  def test_contexts_pair_each_class_with_each_query(self, is_gaussian):
    draw = data.DrawContexts(num_classes=4, num_queries=2)
    source = data.ContextSource(np.bool_(is_gaussian), np.int32(1))
    batch = draw(self.key, source)
    np.testing.assert_array_equal(batch.query, [0] * 4 + [1] * 4)
    np.testing.assert_array_equal(batch.label, [0, 1, 2, 3, 1, 2, 3, 0])
    np.testing.assert_array_equal(batch.counts[:4], batch.counts[4:])
    self.assertEqual(len(np.unique(batch.counts, axis=0)), 4)
    other = data.ContextSource(np.bool_(not is_gaussian), np.int32(0))
    self.assertGreater(
        np.abs(draw(self.key, other).counts - batch.counts).max(), 0.01
    )
    np.testing.assert_array_equal(draw(self.key, other).label[4:], range(4))


class TreeTest(absltest.TestCase):

  def test_classes_switch_on_distinct_halves_of_the_top(self):
    tree = data.binary_tree(
        *(0,),
        num_classes=6,
        num_roots=4,
        branching=(2, 3),
        polarity=0.8,
        weak_polarity=0.1,
    )
    self.assertLen(np.unique(tree.root_probs, axis=0), 6)
    np.testing.assert_allclose(
        np.unique(tree.root_probs), [0.1, 0.9], rtol=1e-6
    )
    np.testing.assert_allclose(tree.root_probs.sum(axis=1), 2, rtol=1e-6)
    np.testing.assert_allclose(tree.polarity[0], 0.8)
    self.assertLen(tree.polarity[1], 24)
    np.testing.assert_allclose(tree.polarity[1][::2], 0.8)
    np.testing.assert_allclose(tree.polarity[1][1::2], 0.1)

  def test_shuffled_labels_have_nothing_to_do_with_the_leaves(self):
    tree = data.binary_tree(
        0, num_classes=2, num_roots=2, branching=(1,), polarity=1.0
    )
    draw = jax.jit(data.DrawTree(2000))
    true, shuffled = (
        draw(jax.random.key(1), data.TreeSource(tree, np.bool_(flag)))
        for flag in (False, True)
    )
    np.testing.assert_array_equal(true.counts, shuffled.counts)
    leaf = lambda batch: np.asarray(batch.counts)[:, 0]
    correlation = lambda batch: np.corrcoef(leaf(batch), batch.label)[0, 1]
    self.assertAlmostEqual(abs(correlation(true)), 1, places=5)
    # Four standard errors.
    self.assertLess(abs(correlation(shuffled)), 0.09)
    np.testing.assert_array_equal(
        np.bincount(true.label), np.bincount(shuffled.label)
    )


if __name__ == "__main__":
  absltest.main()
