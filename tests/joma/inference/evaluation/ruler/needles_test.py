import collections
import re
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from joma.inference.evaluation.ruler import hay
from joma.inference.evaluation.ruler import needles

_ESSAY = ("It rained.", "Nobody came.", "The bell rang twice.")
_NEEDLE = re.compile(r"One of the special magic (\w+) for (\S+) is: ([\w-]+)\.")
_NUMBER, _UUID = r"[1-9]\d{6}", r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"


def _draw(name, seed=0, size=6, depth=None):
  task = needles.TASKS[name]
  return needles.draw(np.random.default_rng(seed), size, task, _ESSAY, depth)


class NeedlesTest(parameterized.TestCase):

  def test_one_number_in_noise_is_the_text_of_the_paper(self):
    drawn = {
        "words": lambda generator, number: ["calm-river"],
        "numbers": lambda generator, number: ["1234567"],
    }
    with mock.patch.dict(needles._DRAWN, drawn):
      sample = _draw("niah_single_1", size=2, depth=0.5)
    noise = (
        "The grass is green. The sky is blue. The sun is yellow. Here we go."
        " There and back again."
    )
    self.assertEqual(
        sample.text,
        "A special magic number is hidden within the following text. Make sure"
        " to memorize it. I will quiz you about the number afterwards.\n"
        + noise
        + "\nOne of the special magic numbers for calm-river is: 1234567.\n"
        + noise
        + "\nWhat is the special magic number for calm-river mentioned in the"
        " provided text? The special magic number for calm-river mentioned in"
        " the provided text is",
    )
    self.assertEqual(sample.answers, ("1234567",))
    self.assertFalse(sample.any_counts)

  @parameterized.parameters(
      # Keys, values of each, asked, and how both look.
      ("niah_single_1", 1, 1, 1, r"\w+-\w+", _NUMBER),
      ("niah_single_2", 1, 1, 1, r"\w+-\w+", _NUMBER),
      ("niah_single_3", 1, 1, 1, r"\w+-\w+", _UUID),
      ("niah_multikey_1", 4, 1, 1, r"\w+-\w+", _NUMBER),
      ("niah_multikey_2", 1 + 6, 1, 1, r"\w+-\w+", _NUMBER),
      ("niah_multikey_3", 1 + 6, 1, 1, _UUID, _UUID),
      ("niah_multivalue", 1, 4, 1, r"\w+-\w+", _NUMBER),
      ("niah_multiquery", 4, 1, 4, r"\w+-\w+", _NUMBER),
  )
  def test_what_is_asked_is_what_needles_say(
      self, name, num_keys, num_values, num_asked, key_like, value_like
  ):
    for seed in range(3):
      sample = _draw(name, seed)
      said = collections.defaultdict(list)
      for _, key, value in _NEEDLE.findall(sample.context):
        self.assertRegex(key, f"^{key_like}$")
        self.assertRegex(value, f"^{value_like}$")
        said[key].append(value)
      self.assertLen(said, num_keys)
      self.assertEqual({len(v) for v in said.values()}, {num_values})
      asked = [key for key in said if key in sample.question]
      self.assertLen(asked, num_asked)
      wanted = [value for key in asked for value in said[key]]
      self.assertCountEqual(sample.answers, wanted)

  @parameterized.parameters((0.0, 0), (0.25, 2), (1.0, 8))
  def test_a_depth_is_a_share_of_the_hay(self, depth, place):
    lines = _draw("niah_single_1", size=8, depth=depth).context.split("\n")[1:]
    self.assertLen(lines, 9)
    self.assertEqual([i for i, x in enumerate(lines) if "magic" in x], [place])

  def test_several_are_listed_and_in_the_plural(self):
    sample = _draw("niah_multiquery")
    self.assertStartsWith(sample.context, "Some special magic numbers are")
    self.assertRegex(
        sample.question,
        r"^\nWhat are all the special magic numbers for \S+, \S+, \S+, and \S+"
        r" mentioned in the provided text\?$",
    )
    self.assertEndsWith(sample.prefix, "mentioned in the provided text are")


class HayTest(parameterized.TestCase):

  def test_an_essay_goes_on_at_its_start(self):
    pieces = hay.draw(np.random.default_rng(0), "essay", 7, _ESSAY, str)
    start = _ESSAY.index(pieces[0])
    self.assertEqual(pieces, [_ESSAY[(start + i) % 3] for i in range(7)])

  def test_needles_keep_their_order(self):
    for seed in range(5):
      text = hay.hide(
          np.random.default_rng(seed), ["x"] * 9, "abc", between=" "
      )
      self.assertEqual(text.replace("x", "").split(), ["a", "b", "c"])
      self.assertEqual(text.count("x"), 9)

  def test_the_embedded_text_is_cut_into_sentences(self):
    found = hay.essay()
    self.assertGreater(len(found), 10_000)
    self.assertEqual(
        found[0], "First Citizen: Before we proceed any further, hear me speak."
    )

  def test_a_file_is_hay_too(self):
    path = self.create_tempfile(
        content="One. Two!\nIs it  three? Yes"
    ).full_path
    self.assertEqual(hay.essay(path), ("One.", "Two!", "Is it three?", "Yes"))


if __name__ == "__main__":
  absltest.main()
