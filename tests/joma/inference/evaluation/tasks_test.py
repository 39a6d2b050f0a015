"""Examples: what is asked is answered by the gold tokens, and nothing else."""

import functools
import itertools

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from joma.inference.evaluation import filler
from joma.inference.evaluation import tasks
from joma.inference.evaluation import tasks_counting
from joma.inference.evaluation import tasks_needles
from joma.inference.evaluation import tasks_symbols
from joma.transformer.text import tokenizer
from scansnap_jax.experiment import errors

_TEXTS = (
    tasks_needles.passkey,
    tasks_needles.niah_single,
    tasks_needles.niah_multikey,
    tasks_needles.niah_multivalue,
    tasks_needles.niah_multiquery,
    tasks_counting.variable_tracking,
    tasks_counting.common_words,
    tasks_counting.frequent_words,
    tasks_counting.long_generation,
)
_NEEDLES = _TEXTS[:5]
_BYTES = tokenizer.Bytes()


def _draw(make, seed=0, length=1500, **options):
  encoder = filler.Encoder(_BYTES)
  return make(encoder, np.random.default_rng(seed), length=length, **options)


def _said(ids):
  return _BYTES.decode(ids)


class _Framed(tokenizer.Tokenizer):
  """Bytes with a special token in front and one behind, as some files ask."""

  name, vocab_size, spoiler = "framed", 300, None

  def encode(self, text, *, special=True):
    ids = _BYTES.encode(text)
    return np.concatenate([[256], ids, [257]]).astype(np.int32)

  def decode(self, ids):
    return _BYTES.decode([i for i in ids if i < 256])

  def to_json(self):
    return ""


class SymbolsTest(parameterized.TestCase):

  @parameterized.product(seed=(0, 1, 2), num_pairs=(4, 16))
  def test_mqar_asks_every_key_once_and_gold_is_its_value(
      self, seed, num_pairs
  ):
    example = tasks_symbols.mqar(
        np.random.default_rng(seed),
        length=128,
        num_pairs=num_pairs,
        vocab_size=100,
    )
    pairs = example.tokens[: 2 * num_pairs].reshape(-1, 2)
    value_of = dict(pairs.tolist())
    self.assertLen(value_of, num_pairs)
    self.assertLess(max(value_of), 50)
    self.assertGreaterEqual(min(value_of.values()), 50)
    asked = [int(example.tokens[q.position]) for q in example.queries]
    self.assertCountEqual(asked, value_of)
    for query in example.queries:
      key = int(example.tokens[query.position])
      self.assertEqual(query.answer.tolist(), [value_of[key]])
      self.assertEqual(
          example.tokens[query.gold].tolist(), query.answer.tolist()
      )
      self.assertEqual(example.tokens[query.gold[0] - 1], key)
    # Keys stand nowhere else.
    places = np.isin(example.tokens, list(value_of)).sum()
    self.assertEqual(places, 2 * num_pairs)

  def test_most_queries_of_mqar_follow_soon(self):
    gaps = [
        query.position - 16
        for seed in range(50)
        for query in tasks_symbols.mqar(
            np.random.default_rng(seed), length=512
        ).queries
    ]
    # Places are 0 to 494; weights 1 / (g + 1) make half of them near.
    self.assertLess(np.median(gaps), 120)
    self.assertGreater(max(gaps), 400)

  def test_induction_and_copy_ask_what_came_before(self):
    for seed in range(5):
      generator = np.random.default_rng(seed)
      found = tasks_symbols.induction(generator, length=40)
      (query,) = found.queries
      place = query.gold[0]
      self.assertEqual(found.tokens[place - 1], found.tokens[-1])
      self.assertEqual(found.tokens[place], query.answer[0])
      self.assertEqual((found.tokens == found.tokens[-1]).sum(), 2)
      found = tasks_symbols.copy(generator, length=40, num_copied=6)
      for i, query in enumerate(found.queries, start=1):
        self.assertEqual(query.position, 40 - 6 + i - 1)
        self.assertEqual(found.tokens[query.position + 1], query.answer[0])
        self.assertEqual(found.tokens[query.gold[0]], query.answer[0])

  @parameterized.parameters((64, 64, 9), (64, 9, 3), (5, 64, 4))
  def test_count_asks_at_each_mark_how_many_there_were(
      self, length, vocab_size, most
  ):
    said = set()
    for seed in range(60):
      found = tasks_symbols.count(
          np.random.default_rng(seed), length=length, vocab_size=vocab_size
      )
      self.assertLen(found.tokens, length)
      self.assertEqual(found.tokens[0], 1)
      self.assertTrue(set(found.tokens[1:]) <= {2, 3, 4, 5})
      marks = np.flatnonzero(found.tokens == 2)
      asked = [query.position for query in found.queries]
      self.assertEqual(asked, marks.tolist())
      for number, query in enumerate(found.queries, start=1):
        self.assertEqual(query.answer.tolist(), [5 + number])
        np.testing.assert_array_equal(query.gold, marks[:number])
      self.assertLess(5 + len(marks), vocab_size)
      said.add(len(marks))
    self.assertEqual(said, set(range(1, most + 1)))

  def test_count_refuses_sizes_that_are_too_small(self):
    for length, vocab_size, name in ((1, 64, "length"), (8, 6, "vocab_size")):
      with self.assertRaisesRegex(errors.UserError, f"{name} must"):
        tasks_symbols.count(
            np.random.default_rng(0), length=length, vocab_size=vocab_size
        )

  def test_a_seed_is_an_example(self):
    draw = lambda seed: tasks_symbols.mqar(np.random.default_rng(seed))
    np.testing.assert_array_equal(draw(1).tokens, draw(1).tokens)
    self.assertFalse((draw(1).tokens == draw(2).tokens).all())

  @parameterized.parameters(
      (dict(num_pairs=0), "num_pairs"),
      (dict(length=31), "4 num_pairs, 32"),
      (dict(vocab_size=10), "vocab_size"),
  )
  def test_sizes_that_cannot_be(self, options, message):
    with self.assertRaisesRegex(errors.UserError, message):
      tasks_symbols.mqar(np.random.default_rng(0), **options)


class TextsTest(parameterized.TestCase):

  @parameterized.product(make=_TEXTS, seed=(0, 1))
  def test_fits_and_ends_with_the_question(self, make, seed):
    example = _draw(make, seed)
    (query,) = example.queries
    self.assertLessEqual(len(example.tokens), 1500)
    if make is not tasks_counting.long_generation:
      # Lists leave what the longest word would take of each of theirs.
      self.assertGreater(len(example.tokens), 1000)
    self.assertEqual(query.position, len(example.tokens) - 1)
    self.assertLess(query.gold.max(), example.num_context)
    self.assertTrue((np.diff(query.gold) > 0).all())
    for answer in example.answers:
      self.assertIn(answer, _said(query.answer))

  @parameterized.parameters(*_NEEDLES)
  def test_gold_of_needles_are_the_numbers_asked(self, make):
    example = _draw(make)
    gold = _said(example.tokens[example.queries[0].gold]).split()
    self.assertCountEqual(gold, example.answers)
    context = _said(example.tokens[: example.num_context])
    for answer in example.answers:
      self.assertIn(answer, context)

  def test_the_question_names_the_words_of_the_numbers(self):
    example = _draw(tasks_needles.niah_multiquery)
    text = _said(example.tokens)
    context = _said(example.tokens[: example.num_context])
    question = text[len(context) :]
    for answer in example.answers:
      word = context.partition(f" is {answer}.")[0].split()[-1]
      self.assertIn(word, question)

  def test_a_pass_key_lies_where_it_is_told_to(self):
    for depth, least, most in ((0.0, 0, 0.1), (0.5, 0.4, 0.6), (1.0, 0.85, 1)):
      example = _draw(tasks_needles.passkey, depth=depth)
      place = example.queries[0].gold[0] / len(example.tokens)
      self.assertBetween(place, least, most)

  def test_variables_follow_from_the_number(self):
    example = _draw(tasks_counting.variable_tracking, num_chains=3, num_hops=3)
    context = _said(example.tokens[: example.num_context])
    stated = [
        tuple(s.removeprefix("VAR ").split(" = "))
        for s in context.split(".")
        for s in [s[s.find("VAR") :]]
        if " = " in s
    ]
    self.assertLen(stated, 12)
    number = _said(example.tokens).partition("the value ")[2][:5]
    known = set()
    for name, source in stated:
      if source == number or source in known:
        known.add(name)
    self.assertCountEqual(known, example.answers)
    gold = _said(example.tokens[example.queries[0].gold])
    self.assertEqual(gold.count("VAR"), 4)

  def test_common_words_are_the_common_ones(self):
    example = _draw(tasks_counting.common_words, length=6000, num_common=5)
    context = _said(example.tokens[: example.num_context])
    words = [w for w in context.split() if w in filler.WORDS]
    names, counts = np.unique(words, return_counts=True)
    ranked = names[np.argsort(-counts)]
    self.assertCountEqual(ranked[:5], example.answers)
    self.assertEqual(set(counts.tolist()), {30, 3})
    gold = _said(example.tokens[example.queries[0].gold]).split()
    self.assertLen(gold, 150)

  def test_frequent_words_follow_a_zeta_law(self):
    example = _draw(tasks_counting.frequent_words, length=12_000)
    context = _said(example.tokens[: example.num_context])
    words = [w for w in context.split() if w in filler.WORDS]
    names, counts = np.unique(words, return_counts=True)
    order = np.argsort(-counts)
    self.assertEqual(tuple(names[order[:3]]), example.answers)
    # 1, 1/4 and 1/9 of the most frequent: 6/pi^2 of all, about.
    self.assertAlmostEqual(counts[order[0]] / len(words), 0.61, delta=0.05)
    self.assertAlmostEqual(
        counts[order[1]] / counts[order[0]], 1 / 4, delta=0.06
    )

  def test_words_asked_are_more_frequent_than_all_others(self):
    for seed in range(20):
      example = _draw(tasks_counting.frequent_words, seed, alpha=1.0)
      context = _said(example.tokens[: example.num_context])
      count = {word: context.split().count(word) for word in filler.WORDS}
      ranked = sorted(count.values(), reverse=True)
      said = [count[word] for word in example.answers]
      self.assertEqual(said, ranked[:3])
      self.assertGreater(said[-1], ranked[3])

  @parameterized.parameters(60.0, 1e-9)
  def test_frequencies_that_never_differ_are_refused(self, alpha):
    # With 60 all words are the first one; with 0 few of so many are there.
    with self.assertRaisesRegex(
        errors.UserError, f"alpha={alpha} .* 1000 draws"
    ):
      _draw(
          tasks_counting.frequent_words, length=1500, alpha=alpha, num_asked=8
      )

  def test_sums_are_right(self):
    example = _draw(tasks_counting.long_generation, num_steps=6)
    gold = _said(example.tokens[example.queries[0].gold])
    numbers = [int(n) for n in gold.split(",")]
    totals = list(itertools.accumulate(numbers))
    for step, number, total in zip(
        example.answers, numbers, totals, strict=True
    ):
      self.assertEqual(step, f"{total - number} + {number} = {total}")

  def test_filler_of_shakespeare(self):
    example = _draw(tasks_needles.niah_single, kind="shakespeare")
    lines = {line.strip() for line in filler.shakespeare()}
    text = _said(example.tokens)
    self.assertTrue(any(line in text for line in lines if len(line) > 20))

  def test_special_tokens_come_once_in_front(self):
    encoder = filler.Encoder(_Framed())
    self.assertEqual(encoder.front.tolist(), [256])
    example = tasks_needles.niah_single(
        encoder, np.random.default_rng(0), length=500
    )
    self.assertEqual(np.flatnonzero(example.tokens > 255).tolist(), [0])
    gold = _said(example.tokens[example.queries[0].gold])
    self.assertEqual(gold.split(), list(example.answers))
    self.assertTrue((example.queries[0].answer < 256).all())

  @parameterized.parameters(*_TEXTS)
  def test_too_short_a_text_says_so(self, make):
    with self.assertRaisesRegex(errors.UserError, "length=40 is too short"):
      _draw(make, length=40)


class StackTest(absltest.TestCase):

  def test_pads_and_marks_what_is_asked(self):
    generator = np.random.default_rng(0)
    draw = functools.partial(tasks_symbols.mqar, num_pairs=2, vocab_size=20)
    drawn = [draw(generator, length=length) for length in (12, 10)]
    batch = tasks.stack(drawn, num_gold=3)
    self.assertEqual(batch.tokens.shape, (2, 12))
    self.assertEqual(batch.gold.shape, (2, 12, 3))
    self.assertEqual(batch.lengths.tolist(), [12, 10])
    self.assertEqual((batch.targets >= 0).sum(axis=1).tolist(), [2, 2])
    query = drawn[1].queries[0]
    self.assertEqual(batch.targets[1, query.position], query.answer[0])
    self.assertEqual(
        batch.gold[1, query.position].tolist(), [query.gold[0], -1, -1]
    )

  def test_an_answer_of_several_tokens_begins_with_its_first(self):
    query = tasks.Query(
        position=2,
        answer=np.array([7, 8, 9], np.int32),
        gold=np.array([0], np.int32),
    )
    example = tasks.Example(
        tokens=np.zeros(3, np.int32), queries=(query,), num_context=1
    )
    batch = tasks.stack([example])
    self.assertEqual(batch.targets.tolist(), [[-1, -1, 7]])
    self.assertEqual(batch.num_new, 3)

  def test_refuses_what_is_no_example(self):
    with self.assertRaisesRegex(errors.UserError, "at least one"):
      tasks.stack([])
    ids = np.zeros(3, np.int32)
    with self.assertRaisesRegex(errors.UserError, "at least one token"):
      tasks.Example(tokens=ids[:0], queries=(), num_context=1)
    with self.assertRaisesRegex(errors.UserError, "before their query"):
      query = tasks.Query(position=1, answer=ids[:1], gold=ids[:1] + 2)
      tasks.Example(tokens=ids, queries=(query,), num_context=1)


if __name__ == "__main__":
  absltest.main()
