"""Sizes of examples, their ids, and their scores."""

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from joma.inference.evaluation.ruler import ruler_config
from joma.inference.evaluation.ruler import ruler_tasks
from joma.inference.evaluation.ruler import sample as sample_lib
from joma.inference.evaluation.ruler import scoring
from joma.inference.evaluation.ruler import written
from joma.transformer.text import chat_template
from joma.transformer.text import tokenizer
from scansnap_jax.experiment import errors

_ESSAY = ("It rained all day long.", "Nobody came.")
_count = lambda sample: len(sample.text)


class FittedTest(parameterized.TestCase):

  @parameterized.parameters(*ruler_config.NAMES)
  def test_no_larger_example_fits(self, name):
    made = []
    base = ruler_tasks.drawer(name, _ESSAY)

    def draw(generator, size):
      made.append(size)
      return base(generator, size)

    sample = ruler_tasks.fitted(name, draw, (0, 1), 2600, _count)
    self.assertLessEqual(_count(sample), 2600)
    size = made[-1]
    # The same seed draws it, whatever was tried before.
    self.assertEqual(base(np.random.default_rng([0, 1]), size), sample)
    larger = base(np.random.default_rng([0, 1]), size + 1)
    # Common words occur so often each that a list grows in steps.
    if name != "cwe":
      self.assertGreater(_count(larger), 2600)

  def test_seeds_draw_different_examples(self):
    draw = ruler_tasks.drawer("niah_single_1", _ESSAY)
    samples = {
        ruler_tasks.fitted("niah_single_1", draw, seed, 900, _count).text
        for seed in ((0, 0), (0, 1), (1, 0))
    }
    self.assertLen(samples, 3)

  @parameterized.parameters(*ruler_config.NAMES)
  def test_what_has_no_room_is_named(self, name):
    draw = ruler_tasks.drawer(name, _ESSAY)
    for call in (
        lambda: ruler_tasks.fitted(name, draw, (0,), 90, _count),
        lambda: ruler_tasks.check_fits(name, draw, 90, _count),
    ):
      with self.assertRaisesRegex(errors.UserError, f"length=90 .* {name},"):
        call()


class ScoringTest(parameterized.TestCase):

  @parameterized.parameters(
      ("It is 1234567.", ("1234567",), False, 1.0),
      ("it is 123456", ("1234567",), False, 0.0),
      ("ABCDE and fghij", ("abcde", "FGHIJ", "KLMNO", "PQRST"), False, 0.5),
      ("Oakford, I think", ("oakford", "Milton"), True, 1.0),
      ("", ("oakford",), True, 0.0),
  )
  def test_shares_of_what_was_said(self, said, answers, any_counts, expected):
    found = scoring.score(said, answers, any_counts=any_counts)
    self.assertEqual(found, expected)


class _Template:
  """Jinja's part of a chat template."""

  def generate(self, messages, **options):
    (message,) = messages
    assert options["add_generation_prompt"]
    yield f"<user>{message['content']}</user><assistant>"


class _Framed(tokenizer.Bytes):
  """Bytes, a special token in front."""

  def encode(self, text, *, special=True):
    ids = super().encode(text)
    return np.concatenate([[0], ids]).astype(np.int32) if special else ids


class WriterTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    self.sample = sample_lib.Sample(
        context="It rained.", question=" Did it?", prefix=" Answer:", answers=()
    )

  def test_the_context_does_not_know_the_question(self):
    made = written.Writer(_Framed()).write(self.sample)
    self.assertEqual(bytes(made.context.tolist()), b"\0It rained.")
    self.assertEqual(bytes(made.question.tolist()), b" Did it? Answer:")
    self.assertEqual(written.Writer(_Framed()).count(self.sample), 27)

  def test_a_chat_ends_before_the_answer_begins(self):
    writer = written.Writer(
        _Framed(), chat_template.ChatTemplate("here", _Template(), {})
    )
    made = writer.write(self.sample)
    self.assertEqual(bytes(made.context.tolist()), b"<user>It rained.")
    self.assertEqual(
        bytes(made.question.tolist()), b" Did it?</user><assistant>Answer:"
    )


class ConfigTest(parameterized.TestCase):

  @parameterized.parameters(
      (dict(names=("niah",)), "niah is none of"),
      (dict(budgets=(1.0,)), r"ruler.budgets=1.0 must lie in \(0, 1\)"),
      (dict(map_budget=0.0), "ruler.map_budget"),
      (dict(depths=(1.5,)), "ruler.depths=1.5"),
      (dict(passes=2.0), "ruler.passes"),
      (dict(answer_tokens=-1), "ruler.answer_tokens"),
      (dict(lengths=(1,)), "ruler.lengths"),
  )
  def test_refuses(self, fields, message):
    with self.assertRaisesRegex(errors.UserError, message):
      ruler_config.RulerConfig(**fields)

  def test_answers_are_as_long_as_the_paper_has_them_or_less(self):
    config = ruler_config.RulerConfig(answer_tokens=40)
    self.assertEqual(config.num_new("niah_multivalue"), 40)
    self.assertEqual(config.num_new("vt"), 30)
    config = ruler_config.RulerConfig()
    lengths = [config.num_new(name) for name in ruler_config.NAMES]
    self.assertEqual(lengths, [128] * 8 + [30, 120, 50, 32, 32])

  def test_a_heat_map_is_of_the_first_needle(self):
    config = ruler_config.RulerConfig(
        names=("vt", "niah_single_2"), depths=(0.5,)
    )
    self.assertEqual(config.mapped(), "niah_single_2")
    config = ruler_config.RulerConfig(names=("vt",), depths=(0.5,))
    with self.assertRaisesRegex(errors.UserError, "no task of ruler.names"):
      config.mapped()


if __name__ == "__main__":
  absltest.main()
