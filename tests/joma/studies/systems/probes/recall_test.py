from absl.testing import absltest
import jax
import numpy as np
import pytest

from joma.studies.systems.probes import recall
from joma.studies.systems.subjects import associations
from scansnap_jax.experiment import errors
from tests.joma.studies.systems import small

_TASK = associations.Associations(
    num_names=4, num_relations=3, num_values=5, num_filler=2
)


class RecallTest(absltest.TestCase):

  @pytest.mark.slow
  def test_runs_and_is_drawn(self):
    summary = small.measured("recall")
    self.assertLen(summary["claims"], 5)
    self.assertEqual(summary["claims"][0]["it"], "FAILED")  # It is untrained.
    self.assertEqual(summary["claims"][1]["it"], "holds")
    self.assertLessEqual(max(summary["num_found"]), 2)
    figure, texts = small.drawn("recall")
    self.assertLen(figure.axes, 2)
    self.assertContainsSubset(["logits moved", "model 1"], texts)

  def test_heads_are_found_by_what_they_move_of_the_first_half(self):
    # Heads 1 and 3 together bring the answer; 1 moves more, and 0 a little.
    moves = np.array([[0.5, 3.0], [0.0, 2.0]])
    is_first = np.array([True, True, False, False])

    def flips(is_patched):
      both = is_patched[0, 1] and is_patched[1, 1]
      # On the second half head 2 moves most, which must not count.
      late = 9.0 * is_patched[1, 0]
      moved = np.full(4, (moves * is_patched).sum()) + late * ~is_first
      return moved, np.array([both, both, both, False])

    config = recall.RecallConfig(num_layers=2, num_heads=2, num_random=3)
    found = recall._found(config, flips, is_first, 0)
    np.testing.assert_allclose(found["effects"], moves)
    self.assertEqual(found["num_found"], 2)
    self.assertEqual(found["flip"], 0.5)
    self.assertEqual(found["random"], 0.0)

  def test_facts_are_asked_and_answered(self):
    tokens, targets, is_asked, _ = map(
        np.asarray, _TASK.draw(jax.random.key(0), 200)
    )
    facts = np.asarray(_TASK.facts())
    self.assertEqual(tokens.shape, (200, 5))
    for text, target, asked in zip(tokens, targets, is_asked, strict=True):
      first, last, relation = text[0], text[1] - 4, text[-1] - 8
      self.assertIn(first, range(4))
      self.assertIn(last, range(4))
      self.assertTrue(all(11 <= word < 19 for word in text[2:4]))
      self.assertEqual(target[-1], facts[4 * first + last, relation])
      self.assertEqual(target[-1] - 19 - 5 * relation, (target[-1] - 19) % 5)
      self.assertEqual(asked.tolist(), [False] * 4 + [True])
    self.assertLess(facts.max(), _TASK.vocab_size)

  def test_pairs_are_of_one_relation_one_half_and_two_answers(self):
    found = jax.tree.map(np.asarray, _TASK.pairs(jax.random.key(1)))
    subject = lambda text: (int(text[0]), int(text[1]))
    halves = {True: set(), False: set()}
    for row in range(48):
      halves[bool(found.is_first_half[row])].add(subject(found.tokens[row]))
    self.assertLen(halves[True], 8)
    self.assertEmpty(halves[True] & halves[False])
    for row in range(48):
      own, other = found.tokens[row], found.other_tokens[row]
      self.assertEqual(own[-1], other[-1])
      half = halves[bool(found.is_first_half[row])]
      self.assertIn(subject(other), half)
      self.assertNotEqual(found.answers[row], found.other_answers[row])
      first, last = subject(other)
      answer = _TASK.facts()[4 * first + last - 4, found.relations[row]]
      self.assertEqual(found.other_answers[row], answer)

  def test_says_what_would_be_right(self):
    with self.assertRaisesRegex(errors.UserError, "multiple of 8"):
      recall.RecallConfig(width=20)


if __name__ == "__main__":
  absltest.main()
