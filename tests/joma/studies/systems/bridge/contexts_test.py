from absl.testing import absltest
import numpy as np

from joma.studies.systems.bridge import contexts

_C = 3


def _places(tokens, label):
  """Places of queries with a whole context in front of them."""
  return [i for i in range(_C, len(tokens) - 1) if tokens[i + 1] == label]


class TextTest(absltest.TestCase):

  def test_a_context_stands_in_front_of_its_query(self):
    found = contexts.Text(np.arange(50), 50).draw(
        np.random.default_rng(0), 400, _C
    )
    for context, query, label in zip(*found, strict=True):
      self.assertEqual(context.tolist(), [query - 3, query - 2, query - 1])
      self.assertEqual(label, query + 1)
    # The first query with a whole context, and the last with a next token.
    self.assertEqual((found.query.min(), found.query.max()), (3, 48))

  def test_resampled_tokens_are_those_in_front_of_the_same_next_token(self):
    tokens = np.random.default_rng(1).integers(0, 5, size=60)
    source = contexts.Text(tokens, 5, is_resampled=True)
    found = source.draw(np.random.default_rng(2), 20_000, _C)
    for label in range(5):
      want = np.zeros(5)
      places = _places(tokens, label)
      for i in places:
        for offset in range(1, _C + 1):
          want[tokens[i - offset]] += 1 / (3 * len(places))
      drawn = found.context[found.label == label]
      # Five standard deviations of a share over 4,000 contexts or so.
      for column in drawn.T:
        share = np.bincount(column, minlength=5) / len(column)
        np.testing.assert_allclose(share, want, atol=2.5 / len(column) ** 0.5)
      # Places of one context are drawn one by one.
      both = np.mean((drawn[:, 0] == 0) & (drawn[:, 1] == 0))
      self.assertAlmostEqual(both, want[0] ** 2, delta=0.04)

  def test_only_allowed_pairs_are_drawn(self):
    tokens = np.array([0, 1, 0, 2, 0, 1, 0, 1, 2, 2, 1, 2, 0, 1] * 4)
    allowed = contexts.most_frequent_next(tokens, 4, 1)
    # 0 is followed by 1 twelve times of 16, 1 by 2 and by 0 eight and seven
    # times, 2 by 0, 1 and 2 eight, four and four times; 3 never stands there.
    self.assertEqual(np.argwhere(allowed).tolist(), [[0, 1], [1, 0], [2, 0]])
    source = contexts.Text(tokens, 4, allowed=allowed)
    found = source.draw(np.random.default_rng(0), 300, _C)
    self.assertEqual(
        set(zip(found.query.tolist(), found.label.tolist(), strict=True)),
        {(0, 1), (1, 0), (2, 0)},
    )


class ClassesTest(absltest.TestCase):

  def test_tokens_are_drawn_as_often_as_their_class_has_them(self):
    source = contexts.Classes()
    found = source.draw(np.random.default_rng(0), 6000, 20)
    classes = source._classes
    self.assertEqual(len(set(found.label.tolist())), 6)
    for n, label in enumerate(classes.label):
      rows = found.label == label
      self.assertEqual(set(found.query[rows].tolist()), {classes.query[n]})
      count = np.bincount(found.context[rows].ravel(), minlength=79)
      share = count / count.sum()
      np.testing.assert_allclose(
          share, classes.probs[n], atol=5 * (0.1 / count.sum()) ** 0.5
      )


if __name__ == "__main__":
  absltest.main()
