import itertools

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from joma.theory import cooccurrence
from joma.theory import data

# A few hundred float64 roundings of numbers near 1.
_ATOL = 1e-12


def _binary_tree(num_depths, polarity, root_probs):
  """Two children per node, in float64."""
  num_nodes = root_probs.shape[1] * 2 ** np.arange(num_depths)
  return data.Hblt(
      np.full(len(root_probs), 1 / len(root_probs)),
      root_probs,
      tuple(np.repeat(np.arange(n), 2) for n in num_nodes[:-1]),
      tuple(np.full(n, polarity) for n in num_nodes[1:]),
  )


def _irregular_tree():
  """Three depths, 2, 5 and 7 nodes, every edge of its own polarity."""
  return data.Hblt(
      np.array([0.5, 0.2, 0.3]),
      np.array([[0.9, 0.2], [0.4, 0.6], [0.1, 0.7]]),
      (np.array([0, 0, 0, 1, 1]), np.array([0, 0, 1, 2, 3, 3, 4])),
      (
          np.array([0.9, -0.4, 0.5, 0.7, 0.2]),
          np.array([0.8, 0.3, -0.6, 1.0, 0.5, -1.0, 0.0]),
      ),
  )


class FormulaTest(parameterized.TestCase):

  def test_numbers(self):
    # L = 5, rho = .8; the numbers of the reference belong to rho_0 = .1.
    actual = [cooccurrence.cooccurrence(0.8, 0.1, 5, h) for h in range(5)]
    expected = [0.5661141141, 0.6153153153, 0.6921921922, 0.8123123123, 1.0]
    np.testing.assert_allclose(actual, expected, atol=1e-10)

  @parameterized.parameters((0.8, (0.2, 0.7)), (-0.6, (0.9, 0.3)))
  def test_equals_enumeration_at_every_depth(self, polarity, on):
    tree = _binary_tree(5, polarity, np.array([[on[0]], [on[1]]]))
    rho_0 = cooccurrence.root_polarity(tree)[0]
    self.assertAlmostEqual(rho_0, 1 - sum(on))
    # Leaf 0 and leaf 2^j have their ancestor j + 1 edges up.
    for depth, other in ((0, 8), (1, 4), (2, 2), (3, 1), (4, 0)):
      formula = cooccurrence.cooccurrence(polarity, rho_0, 5, depth)
      summed = cooccurrence.enumerated_cooccurrence(tree, 0, other)
      self.assertAlmostEqual(formula, summed, delta=_ATOL)
      exact = cooccurrence.exact_cooccurrence(tree)[0, other]
      self.assertAlmostEqual(formula, exact, delta=_ATOL)

  @parameterized.parameters(-1, 5)
  def test_the_root_is_no_common_ancestor(self, depth):
    with self.assertRaisesRegex(ValueError, "L = 5"):
      cooccurrence.cooccurrence(0.8, 0.1, 5, depth)


class ExactTest(absltest.TestCase):

  def test_equals_enumeration_in_an_irregular_tree(self):
    tree = _irregular_tree()
    exact = cooccurrence.exact_cooccurrence(tree)
    self.assertEqual(exact.shape, (7, 7))
    for l, m in itertools.product(range(7), repeat=2):
      summed = cooccurrence.enumerated_cooccurrence(tree, l, m)
      self.assertAlmostEqual(exact[l, m], summed, delta=_ATOL)

  def test_equals_the_sum_over_the_whole_tree(self):
    # All 2^14 values of all nodes at once, not the ancestors alone.
    tree = _irregular_tree()
    sizes = [2, 5, 7]
    bits = np.array(list(itertools.product((0, 1), repeat=sum(sizes))))
    levels = np.split(bits, np.cumsum(sizes)[:-1], axis=1)
    on = tree.root_probs[:, None]
    given_root = np.where(levels[0], on, 1 - on).prod(axis=2)
    weight = tree.class_probs @ given_root
    for d, (parents, rho) in enumerate(
        zip(tree.parents, tree.polarity, strict=True)
    ):
      is_kept = levels[d][:, parents] == levels[d + 1]
      weight = weight * np.where(is_kept, 1 + rho, 1 - rho).prod(axis=1)
      weight = weight / 2 ** len(rho)
    self.assertAlmostEqual(weight.sum(), 1, delta=_ATOL)
    leaves = levels[2]
    both = leaves.T @ (weight[:, None] * leaves)
    np.testing.assert_allclose(
        cooccurrence.exact_cooccurrence(tree),
        both / np.diagonal(both),
        atol=_ATOL,
    )

  def test_absent_leaves_have_none(self):
    tree = _binary_tree(2, 1.0, np.zeros((1, 1)))
    self.assertTrue(np.isnan(cooccurrence.exact_cooccurrence(tree)).all())


if __name__ == "__main__":
  absltest.main()
