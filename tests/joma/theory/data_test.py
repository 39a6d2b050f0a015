from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.theory import cooccurrence
from joma.theory import data
from scansnap_jax.experiment import errors

_ROOT = np.array([[0.9, 0.2], [0.4, 0.6], [0.1, 0.7]])


def _irregular_tree():
  return data.make_hblt(
      _ROOT,
      [[3, 2], [2, 1, 1, 2, 1]],
      [[0.9, -0.4, 0.5, 0.7, 0.2], [0.8, 0.3, -0.6, 1.0, 0.5, -1.0, 0.0]],
      class_probs=np.array([0.5, 0.2, 0.3]),
  )


class ClassContextsTest(parameterized.TestCase):

  def test_bump_moves_with_the_class(self):
    contexts = data.class_contexts(jax.random.key(0), "gaussian")
    chex.assert_trees_all_close(contexts.sum(axis=1), jnp.ones(20), atol=1e-6)
    # Ratios survive normalization: ln(x_l / x_l') is the bump's alone.
    for n, l in ((0, 3), (7, 9), (19, 2)):
      expected = -((l - n / 2) ** 2 - (5 - n / 2) ** 2) / 30
      actual = float(jnp.log(contexts[n, l] / contexts[n, 5]))
      self.assertAlmostEqual(actual, expected, delta=1e-5)

  def test_common_weights_are_those_of_random_mode(self):
    gaussian, random = (
        data.class_contexts(jax.random.key(0), mode)
        for mode in ("gaussian", "random")
    )
    # Up to the normalizer of each class.
    ratio = gaussian[:, 10:] / random[:, 10:]
    chex.assert_trees_all_close(
        ratio, jnp.broadcast_to(ratio[:, :1], ratio.shape), rtol=1e-5
    )

  def test_random_weights_are_uniform_up_to_one_half(self):
    # The bump's tokens show the scale: x / x_0 is weight / exp(-0).
    contexts = data.class_contexts(
        jax.random.key(1), "gaussian", num_classes=1, num_common=10_000
    )
    weights = contexts[0, 10:] / contexts[0, 0]
    self.assertBetween(float(weights.max()), 0.499, 0.5)
    # Four standard errors of a mean of 10,000 draws.
    self.assertAlmostEqual(float(weights.mean()), 0.25, delta=0.006)


class MakeHbltTest(parameterized.TestCase):

  def test_parents_and_sizes(self):
    tree = _irregular_tree()
    self.assertEqual((tree.num_depths, tree.num_leaves), (3, 7))
    np.testing.assert_array_equal(tree.parents[0], [0, 0, 0, 1, 1])
    np.testing.assert_array_equal(tree.parents[1], [0, 0, 1, 2, 3, 3, 4])
    regular = data.make_hblt(_ROOT, [2, 3], 0.5)
    self.assertEqual(regular.num_leaves, 12)
    np.testing.assert_array_equal(regular.polarity[1], np.full(12, 0.5))
    np.testing.assert_allclose(regular.class_probs, np.full(3, 1 / 3))

  @parameterized.parameters(
      (dict(polarity=1.1), r"polarity must lie in \[-1, 1\], got 1.1"),
      (dict(polarity=float("nan")), "polarity must lie"),
      (dict(root_probs=-_ROOT), "root_probs must lie"),
      (dict(class_probs=np.array([0.5, 0.2, 0.2])), "sum to 0.9"),
      (dict(class_probs=np.array([0.5, 0.5])), "class_probs"),
      (dict(polarity=[0.5]), "polarity is given for 1 depths"),
      (dict(branching=[2, 0]), r"\[4, 0\] nodes"),
      (dict(branching=[2, -1]), r"branching\[1\] must be whole numbers"),
      (
          dict(branching=[1.5, 2]),
          # Types are checked of one entry, drawn anew for the message.
          r"branching\[0\] must be whole numbers|parameters of .*make_hblt",
      ),
      (dict(branching=[[1, 2, 3], 2]), r"branching\[0\] must be one value or"),
      (dict(polarity=[0.5, [0.5, 0.5]]), r"polarity\[1\] must be one value or"),
      (dict(root_probs=np.zeros((0, 2))), "Every depth needs a node"),
  )
  def test_impossible_trees_are_refused(self, changes, message):
    options = dict(root_probs=_ROOT, branching=[2, 2], polarity=0.5)
    # The type checker of the tests, which looks at one element of a list taken
    # at random, may come first: both name the argument.
    with self.assertRaisesRegex((errors.UserError, TypeError), message):
      data.make_hblt(**options | changes)


class SampleHbltTest(parameterized.TestCase):

  def test_frequencies_are_the_trees_probabilities(self):
    tree, batch_size = _irregular_tree(), 40_000
    sample = jax.jit(
        lambda key: data.sample_hblt(key, tree, batch_size=batch_size)
    )(jax.random.key(0))
    # Four standard errors of a frequency.
    error = lambda p: 4 * np.sqrt(p * (1 - p) / batch_size) + 1e-12
    drawn = np.bincount(sample.class_index, minlength=3) / batch_size
    np.testing.assert_array_less(
        np.abs(drawn - tree.class_probs), error(tree.class_probs)
    )
    leaves = np.asarray(sample.nodes[-1], np.float64)
    both = leaves.T @ leaves
    exact = cooccurrence.exact_cooccurrence(tree)
    bound = 4 * np.sqrt(exact * (1 - exact) / np.diag(both)) + 1e-12
    np.testing.assert_array_less(np.abs(both / np.diag(both) - exact), bound)

  def test_edges_keep_and_turn(self):
    tree = data.make_hblt(_ROOT, [2], [[1.0, -1.0, 1.0, -1.0]])
    sample = data.sample_hblt(jax.random.key(0), tree, batch_size=64)
    top, leaves = sample.nodes
    np.testing.assert_array_equal(leaves[:, ::2], top)
    np.testing.assert_array_equal(leaves[:, 1::2], ~top)
    self.assertBetween(int(top.sum()), 20, 108)

  def test_without_branching_the_nodes_are_leaves(self):
    tree = data.make_hblt(np.array([[0.0, 1.0]]), [], 0.5)
    sample = data.sample_hblt(jax.random.key(0), tree, batch_size=4)
    self.assertEqual((tree.num_depths, tree.num_leaves), (1, 2))
    np.testing.assert_array_equal(sample.nodes[0], [[False, True]] * 4)


class CommonDepthTest(absltest.TestCase):

  def test_by_hand(self):
    # Depth 0: leaves 0-3 and 4-6; depth 1: (0, 1), 2, 3, (4, 5), 6.
    expected = np.full((7, 7), -1)
    expected[:4, :4] = expected[4:, 4:] = 0
    expected[:2, :2] = expected[4:6, 4:6] = 1
    np.fill_diagonal(expected, 2)
    np.testing.assert_array_equal(
        data.common_depth(_irregular_tree()), expected
    )


class PackTokensTest(parameterized.TestCase):

  @parameterized.parameters(
      (5, [[3, 3, 3, 0, 2], [3, 3, 3, 3, 3]]),
      (3, [[3, 0, 2], [3, 3, 3]]),
      (1, [[2], [3]]),
  )
  @pytest.mark.by_default(0, 1)
  def test_right_aligned_in_order(self, seq_len, expected):
    is_present = jnp.array([[True, False, True], [False, False, False]])
    tokens = data.pack_tokens(is_present, seq_len)
    np.testing.assert_array_equal(tokens, expected)

  def test_random_order_moves_tokens_but_not_padding(self):
    is_present = jnp.arange(6)[None] < jnp.arange(7)[:, None]
    is_present = jnp.tile(is_present, (20, 1))
    tokens = data.pack_tokens(is_present, 8, key=jax.random.key(0))
    ordered = data.pack_tokens(is_present, 8)
    np.testing.assert_array_equal(tokens == 6, ordered == 6)
    # Padding has the highest id, so that it stays last.
    np.testing.assert_array_equal(np.sort(tokens), np.sort(ordered))
    firsts = tokens[6::7, 2]
    self.assertGreater(len(np.unique(firsts)), 3)


if __name__ == "__main__":
  absltest.main()
