"""Tests of heavy hitters and of those who find them."""

from absl.testing import absltest
import numpy as np

from joma.inference.bridge import recall

# Rounding of float64.
_ATOL = 1e-12


class RecallTest(absltest.TestCase):

  def test_equals_a_count_by_hand(self):
    mass = np.array([5.0, 1, 4, 0, 3, 2])  # The best three: 0, 2 and 4.
    scores = np.array([9.0, 8, 7, 0, 1, 2])  # Names 0, 1 and 2.
    self.assertEqual(recall.recall(scores, mass, 3), 2 / 3)
    self.assertEqual(recall.recall(mass, mass, 3), 1)
    self.assertEqual(recall.recall(-mass, mass, 3), 0)

  def test_ties_count_as_if_broken_at_random(self):
    # One slot is left for candidates 1, 2 and 3.
    scores = np.array([[7.0, 3, 3, 3, 0]])
    member = recall.membership(scores, 2)
    np.testing.assert_allclose(
        member, [[1, 1 / 3, 1 / 3, 1 / 3, 0]], atol=_ATOL
    )
    mass = np.array([[0.0, 1, 0, 0, 2]])  # The best two: 1 and 4.
    np.testing.assert_allclose(
        recall.recall(scores, mass, 2), [1 / 6], atol=_ATOL
    )

  def test_random_scores_find_k_of_n(self):
    rng = np.random.default_rng(0)
    mass, scores = rng.uniform(size=(2, 4000, 40))
    found = recall.recall(scores, mass, 10)
    error = found.std(ddof=1) / len(found) ** 0.5
    self.assertLess(abs(found.mean() - 10 / 40), 3 * error)
    self.assertLess(error, 0.003)
    # Scores that know nothing do it exactly.
    expected = recall.recall(np.zeros(40), mass, 10)
    np.testing.assert_allclose(expected, 10 / 40, atol=_ATOL)


class MassTest(absltest.TestCase):

  def test_halves_of_attention_derived_by_hand(self):
    attn_weights = np.array([
        [1.0, 0, 0, 0],
        [0.3, 0.7, 0, 0],
        [0.2, 0.5, 0.3, 0],
        [0.1, 0.6, 0.2, 0.1],
    ])
    found = recall.future_mass(attn_weights)
    np.testing.assert_allclose(found, [0.3, 1.1], atol=_ATOL)
    total = recall.running_score(attn_weights)
    np.testing.assert_allclose(total, [1.3, 0.7], atol=_ATOL)
    # Candidate 0 was seen by two queries, candidate 1 by one.
    mean = recall.running_score(attn_weights, is_mean=True)
    np.testing.assert_allclose(mean, [0.65, 0.7], atol=_ATOL)

  def test_mean_by_type_is_drawn_to_the_mean_by_one_occurrence(self):
    mass = np.array([[[1.0, 2, 3]], [[2.0, 4, 6]]])  # Mean 3.
    tokens = np.array([[0, 1, 0], [0, 0, 0]])
    found = recall.mean_by_type(mass, tokens, vocab_size=3)
    expected = [[(1 + 3 + 2 + 4 + 6 + 3) / 6, (2 + 3) / 2, 3]]
    np.testing.assert_allclose(found, expected, atol=_ATOL)


class PartialRankCorrelationTest(absltest.TestCase):

  def test_finds_what_the_third_does_not_explain_and_nothing_else(self):
    rng = np.random.default_rng(1)
    given, own, noise = rng.normal(size=(3, 4000))
    partial = recall.partial_rank_correlation
    # Three standard errors.
    bound = 3 / len(given) ** 0.5
    self.assertLess(abs(partial(given + own, given + noise, given)), bound)
    self.assertGreater(partial(given + own, own + 0.1 * noise, given), 0.8)
    # Of normal numbers, any monotone map leaves the ranks as they are.
    self.assertAlmostEqual(partial(np.exp(own), own**3, given), 1, delta=_ATOL)

  def test_equal_values_share_their_mean_rank(self):
    # Ranks 1.5 1.5 3 4 and 1 2 3 4 less 2.5; a constant explains nothing.
    found = recall.partial_rank_correlation(
        np.array([1.0, 1, 2, 3]), np.arange(4.0), np.ones(4)
    )
    self.assertAlmostEqual(found, 4.5 / (4.5 * 5) ** 0.5, delta=_ATOL)

  def test_nothing_to_correlate_is_zero(self):
    few, same = np.arange(3.0), np.ones(9)
    self.assertEqual(recall.partial_rank_correlation(few, few, few), 0)
    self.assertEqual(recall.partial_rank_correlation(same, same, same), 0)


class AlongTrainingTest(absltest.TestCase):

  def test_rows_become_curves_of_runs(self):
    rows = [[{"a": 0.1}, {"a": 0.2}, {"a": 0.3}], [{"a": 0.4}] * 3]
    found = recall.along_training(
        [0, 5, 10], rows, num_candidates=8, num_kept=2
    )
    self.assertEqual(found["chance"], 0.25)
    np.testing.assert_array_equal(
        found["recall"]["a"], [[0.1, 0.2, 0.3], [0.4, 0.4, 0.4]]
    )

  def test_recalls_holds_recency_and_chance_beside(self):
    mass = np.array([[3.0, 0, 2, 1]])  # The best two: 0 and 2.
    found = recall.recalls({"mine": mass}, mass, 2)
    self.assertEqual(found, {"mine": 1.0, "recency": 0.5, "random": 0.5})


if __name__ == "__main__":
  absltest.main()
