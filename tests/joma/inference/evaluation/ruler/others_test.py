"""Tracking, counts of words and questions: answers are what the text says."""

from collections import Counter
import re

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from joma.inference.evaluation.ruler import questions
from joma.inference.evaluation.ruler import tracking
from joma.inference.evaluation.ruler import word_counts


class TrackingTest(parameterized.TestCase):

  @parameterized.product(seed=(0, 1, 2), chains=((1, 4), (2, 3)))
  def test_variables_are_those_that_get_the_value(self, seed, chains):
    num_chains, num_hops = chains
    sample = tracking.draw(
        np.random.default_rng(seed),
        12,
        num_chains=num_chains,
        num_hops=num_hops,
    )
    shown, real = sample.context.rsplit("Memorize", 1)
    values = {}
    statements = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", real)
    for name, source in statements:  # In order, as a program would.
      values[name] = values.get(source, source)
    asked = re.search(r"the value (\d{5}) in", sample.question)[1]
    wanted = [name for name, value in values.items() if value == asked]
    self.assertEqual(list(sample.answers), wanted)
    self.assertLen(wanted, num_hops + 1)
    self.assertLen(values, num_chains * (num_hops + 1))
    self.assertIn(f"{num_hops + 1} variables are assigned", sample.prefix)
    self.assertEqual(real.count("There and back again."), 12)
    # The worked example is of other variables, and answered.
    self.assertNotIn(asked, shown)
    self.assertRegex(shown, rf"they are:(?: [A-Z]{{5}}){{{num_hops + 1}}}\n\n$")

  def test_without_a_worked_example(self):
    sample = tracking.draw(np.random.default_rng(0), 1, shows=False)
    self.assertStartsWith(sample.context, "Memorize and track the chain(s)")


class WordCountsTest(parameterized.TestCase):

  @parameterized.parameters(
      # Entries, times of common words and of others.
      (30, 2, 1),
      (100, 9, 1),
      (330, 30, 3),
      (1000, 30, 3),
  )
  def test_ten_words_are_more_common(self, size, times, other):
    sample = word_counts.common(np.random.default_rng(0), size)
    text = sample.context.rsplit("most often.\n", 1)[1]
    entries = re.findall(r"(\d+)\. (\S+)", text)
    self.assertEqual(
        [int(i) for i, _ in entries], [*range(1, len(entries) + 1)]
    )
    counts = Counter(word for _, word in entries)
    self.assertEqual({counts.pop(word) for word in sample.answers}, {times})
    self.assertEqual(set(counts.values()), {other})
    self.assertLen(sample.answers, 10)
    self.assertBetween(len(entries), size - other, size)

  def test_a_worked_example_lists_its_words(self):
    sample = word_counts.common(np.random.default_rng(0), 40)
    first = sample.context.split("\n\n")[0]
    self.assertRegex(first, r"list are: 1\. \S+ 2\. .* 10\. \S+$")

  @parameterized.parameters(60, 137, 1000)
  def test_frequencies_follow_a_zeta_law(self, size):
    sample = word_counts.frequent(np.random.default_rng(1), size)
    text = sample.context.split("coded words. ")[1]
    counts = Counter(text.split())
    total = sum(1 / r**2 for r in range(1, size + 1))
    law = [int(size / r**2 / total) for r in range(1, size + 1)]
    self.assertEqual(counts.pop("...."), law[0])
    ranked = counts.most_common()
    self.assertEqual([n for _, n in ranked], [n for n in law[1:] if n])
    self.assertEqual(tuple(word for word, _ in ranked[:3]), sample.answers)
    self.assertGreater(ranked[2][1], ranked[3][1])


class QuestionsTest(parameterized.TestCase):

  @parameterized.product(seed=(0, 1, 2, 3, 4), size=(1, 9))
  def test_a_passage_holds_the_answer(self, seed, size):
    sample = questions.one_hop(np.random.default_rng(seed), size)
    documents = re.split(r"Document \d+:\n", sample.context)[1:]
    self.assertLen(documents, size + 1)
    asked = re.search(r"(?:was|of) ([A-Z]\w+ [A-Z]\w+)", sample.question)[1]
    (own,) = [text for text in documents if text.startswith(asked)]
    pattern = (
        r"was born in (\w+) in"
        if "town" in sample.question
        else r"became a (\w+) and"
    )
    self.assertEqual(sample.answers, (re.search(pattern, own)[1],))
    self.assertTrue(sample.any_counts)

  @parameterized.product(seed=(0, 1, 2), size=(1, 2, 9))
  def test_two_passages_hold_the_answer_together(self, seed, size):
    sample = questions.two_hops(np.random.default_rng(seed), size)
    documents = re.split(r"Document \d+:\n", sample.context)[1:]
    self.assertLen(documents, size + 2)
    asked = re.search(r"which (\w+ \w+) was", sample.question)[1]
    (own,) = [text for text in documents if text.startswith(asked)]
    town = re.search(r"was born in (\w+) in", own)[1]
    (of_town,) = [text for text in documents if text.startswith(town)]
    river = re.search(r"the river (\w+)\.", of_town)[1]
    self.assertEqual(sample.answers, (river,))
    self.assertNotIn(river, own)


if __name__ == "__main__":
  absltest.main()
