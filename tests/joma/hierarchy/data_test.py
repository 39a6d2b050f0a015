import itertools
import math

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from joma.hierarchy import data
from scansnap_jax.experiment import errors


def _make(seed=0, classes=20, latents=(10, 20), size=2):
  return data.make_hierarchy(
      seed, num_latents=(*latents, classes), set_sizes=(size,) * 3
  )


def _expand(made, level, latent):
  """Latents and tokens below a latent, by recursion over Python sets."""
  held = {(level, latent)}
  for below in made.members[level][latent]:
    if level == 0:
      held.add(("token", int(below)))
    else:
      held |= _expand(made, level - 1, int(below))
  return held


class MakeHierarchyTest(parameterized.TestCase):

  @parameterized.product(classes=(20, 50), size=(2, 3), seed=(0, 1))
  def test_classes_hold_what_recursion_finds(self, classes, size, seed):
    made = _make(seed, classes, size=size)
    for k in range(classes):
      held = _expand(made, 2, k)
      for level, active in enumerate(made.activity):
        expected = {n for kind, n in held if kind == level}
        self.assertEqual(set(np.flatnonzero(active[k]).tolist()), expected)
      tokens = {n for kind, n in held if kind == "token"}
      self.assertEqual(set(np.flatnonzero(made.is_present[k]).tolist()), tokens)
      self.assertLessEqual(len(tokens), made.max_tokens)

  @parameterized.parameters(1, 2, 3)
  def test_any_number_of_levels(self, num_levels):
    made = data.make_hierarchy(
        0,
        num_tokens=12,
        num_latents=(5, 4, 3)[:num_levels],
        set_sizes=(2,) * num_levels,
    )
    self.assertLen(made.activity, num_levels)
    for k in range(made.num_classes):
      held = _expand(made, num_levels - 1, k)
      tokens = {n for kind, n in held if kind == "token"}
      self.assertEqual(set(np.flatnonzero(made.is_present[k]).tolist()), tokens)

  def test_sets_of_a_level_are_distinct_and_have_p_members(self):
    # All ten pairs out of five, which chance alone hardly draws at once.
    made = data.make_hierarchy(
        3, num_tokens=6, num_latents=(10, 45), set_sizes=(2, 2)
    )
    pairs = {tuple(row) for row in made.members[0].tolist()}
    self.assertEqual(pairs, {*itertools.combinations(range(5), 2)})
    pairs = {tuple(row) for row in made.members[1].tolist()}
    self.assertEqual(pairs, {*itertools.combinations(range(10), 2)})

  def test_sets_are_uniform(self):
    # 500 hierarchies of one latent: each of the ten pairs out of five about 50
    # times, with a standard deviation of sqrt(500 .1 .9) = 6.7.
    counts = np.zeros((5, 5), int)
    for seed in range(500):
      made = data.make_hierarchy(
          seed, num_tokens=6, num_latents=(1,), set_sizes=(2,)
      )
      counts[tuple(made.members[0][0])] += 1
    found = counts[np.triu_indices(5, 1)]
    self.assertLess(np.abs(found - 50).max(), 5 * 6.7)

  def test_latents_of_no_class_or_of_all_are_not_used(self):
    # Latent 1 is in both classes, 0 and 2 in one each, 3 in none.
    members = (np.array([[0], [1], [2], [3]]), np.array([[0, 1], [1, 2]]))
    made = data.Hierarchy(5, members)
    np.testing.assert_array_equal(made.is_used(0), [True, False, True, False])
    np.testing.assert_array_equal(made.is_used(1), [True, True])

  def test_is_a_function_of_the_seed(self):
    same, other = _make(4), _make(5)
    for a, b in zip(_make(4).members, same.members, strict=True):
      np.testing.assert_array_equal(a, b)
    self.assertFalse((same.members[2] == other.members[2]).all())

  @parameterized.parameters(
      (20, 2, (6, 8), (19, 20)),
      (30, 2, (6, 8), (26, 30)),
      (50, 2, (6, 8), (38, 50)),
      (20, 3, (13, 26), (19, 20)),
      (30, 3, (13, 26), (26, 30)),
      (50, 3, (13, 26), (38, 50)),
  )
  def test_sizes_of_table_1_are_as_measured_elsewhere(
      self, classes, size, leaves, distinct
  ):
    # The ranges of another program's five seeds, whose draws differ: medians
    # over twenty seeds have to lie in them.
    made = [
        _make(seed, classes, latents, size)
        for seed in range(20)
        for latents in ((10, 20), (20, 30))
    ]
    tokens = np.concatenate([m.is_present.sum(axis=1) for m in made])
    self.assertLessEqual(tokens.max(), size**3)
    self.assertGreaterEqual(np.quantile(tokens, 0.1), leaves[0])
    self.assertLessEqual(np.quantile(tokens, 0.9), leaves[1])
    count = np.median([m.num_distinct_sequences for m in made])
    self.assertBetween(count, *distinct)

  def test_fraction_of_unused_latents(self):
    # 171 of the 190 pairs out of 20 latents miss a given one, so that all 20
    # classes do with chance C(171, 20) / C(190, 20) = .104. The number of 20
    # latents that 300 hierarchies leave out has a standard error of .004 of it.
    unused = [1 - _make(s).activity[1].any(axis=0).mean() for s in range(300)]
    expected = math.comb(171, 20) / math.comb(190, 20)
    self.assertAlmostEqual(np.mean(unused), expected, delta=0.012)

  def test_impossible_levels_are_refused(self):
    with self.assertRaisesRegex(errors.UserError, "11 distinct sets of 2 out"):
      data.make_hierarchy(0, num_tokens=6, num_latents=(11,), set_sizes=(2,))
    with self.assertRaisesRegex(errors.UserError, "one value for each level"):
      data.make_hierarchy(0, num_latents=(3, 3), set_sizes=(2,))


class UnseenClassesTest(parameterized.TestCase):

  @parameterized.parameters(2, 3)
  def test_are_other_sequences_of_the_same_latents(self, size):
    made = _make(1, size=size)
    unseen = data.unseen_classes(0, made, 60)
    self.assertEqual(unseen.shape, (60, size))
    rows = np.concatenate([made.is_present, made.tokens_of(unseen)])
    self.assertLen(np.unique(rows, axis=0), 60 + made.num_distinct_sequences)
    # The levels below follow from recursion, as those of the classes do.
    for row, own in zip(unseen, made.expand(unseen)[0], strict=True):
      below = {int(x) for n in row for x in made.members[1][n]}
      self.assertEqual(set(np.flatnonzero(own).tolist()), below)

  def test_are_all_there_are_if_more_are_asked_for(self):
    made = data.make_hierarchy(
        0, num_tokens=9, num_latents=(4, 3), set_sizes=(2, 2)
    )
    pairs = [*itertools.combinations(range(4), 2)]
    tokens = made.tokens_of(np.array(pairs))
    new = {tuple(row) for row in tokens.tolist()}
    new -= {tuple(row) for row in made.is_present.tolist()}
    self.assertLessEqual(len(new), math.comb(4, 2) - 3)
    unseen = data.unseen_classes(0, made, 10)
    found = {tuple(row) for row in made.tokens_of(unseen).tolist()}
    self.assertEqual(found, new)


class ToTokensTest(parameterized.TestCase):

  def test_tokens_end_the_sequence_in_order(self):
    present = np.zeros((2, 6), bool)
    present[0, [4, 1]] = present[1, [0, 3, 5]] = True
    np.testing.assert_array_equal(
        data.to_tokens(present, 4), [[6, 6, 1, 4], [6, 0, 3, 5]]
    )

  def test_a_class_that_is_too_long_is_refused(self):
    with self.assertRaisesRegex(errors.UserError, "3 tokens; seq_len is 2"):
      data.to_tokens(np.ones((1, 3), bool), 2)

  @parameterized.parameters((2, 9), (3, 28))
  def test_merged_padding_restores_the_sequence(self, size, length):
    made = _make(0, size=size)
    tokens = data.to_tokens(made.is_present, 30)
    merged, num_padding = data.merge_padding(tokens, made.max_tokens)
    self.assertEqual(merged.shape[1], length)
    self.assertEqual(num_padding + length - 1, 30)
    np.testing.assert_array_equal(merged[:, 0], 99)
    restored = np.concatenate(
        [np.repeat(merged[:, :1], num_padding, axis=1), merged[:, 1:]], axis=1
    )
    np.testing.assert_array_equal(restored, tokens)

  def test_without_common_padding_nothing_is_merged(self):
    tokens = np.array([[1, 2, 3], [99, 0, 1]])
    merged, num_padding = data.merge_padding(tokens, 3)
    np.testing.assert_array_equal(merged, tokens)
    self.assertEqual(num_padding, 1)


if __name__ == "__main__":
  absltest.main()
