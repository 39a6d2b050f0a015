"""How much longer rules make a text, against what the library makes of it."""

import json

from absl.testing import absltest
from absl.testing import parameterized
import pytest

from joma.transformer.text import growth
from joma.transformer.text import tokenizer
from scansnap_jax.experiment import errors

tokenizers = pytest.importorskip("tokenizers")
normalizers = tokenizers.normalizers


def _json(*rules):
  made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[]))
  made.normalizer = normalizers.Sequence(list(rules))
  return made, json.loads(made.to_str())


class GrowthTest(parameterized.TestCase):

  @parameterized.parameters(
      # Llama's, and XLNet's kind: nothing grows.
      ([normalizers.Prepend("_"), normalizers.Replace(" ", "_")], 1),
      ([normalizers.Replace("``", '"'), normalizers.NFKD()], 1),
      # Letters of their own do not add up, those of one another do.
      ([normalizers.Replace("a", "bb"), normalizers.Replace("c", "dd")], 2),
      ([normalizers.Replace("a", "bb"), normalizers.Replace("b", "ccc")], 6),
      ([normalizers.Replace("a", "aa")] * 5, 32),
      ([normalizers.Replace("aa", "aaa")] * 2, 2.25),
  )
  def test_is_bounded_as_the_library_grows(self, rules, expected):
    made, fields = _json(*rules)
    self.assertEqual(growth.bound(fields["normalizer"]), expected)
    text = "a" * 64
    grown = made.normalizer.normalize_str(text).removeprefix("_")
    self.assertLessEqual(len(grown), expected * len(text))

  def test_an_expression_may_match_between_all_letters(self):
    rule = normalizers.Replace(tokenizers.Regex("x*"), "12")
    made, fields = _json(rule)
    self.assertLen(made.normalizer.normalize_str("a" * 10), 3 * 10 + 2)
    self.assertEqual(growth.bound(fields["normalizer"]), 3)

  def test_unbounded_growth_is_refused_before_a_text_is_read(self):
    _, fields = _json(*[normalizers.Replace("a", "a" * 10)] * 40)
    with self.assertRaisesRegex(
        errors.UserError, r"normalizer may make a text 1e\+40 times as long"
    ):
      tokenizer.from_json(json.dumps(fields))
    decoder = {"type": "Sequence", "decoders": [{"type": "Strip"}]}
    grow = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 99}
    decoder["decoders"].append(grow)
    with self.assertRaisesRegex(errors.UserError, "decoder may make"):
      growth.check({"decoder": decoder})
    growth.check({"normalizer": None, "decoder": "none"})

  def test_what_is_added_to_every_text_is_bounded(self):
    made, fields = _json(normalizers.Prepend("ab"), normalizers.Prepend("c"))
    self.assertEqual(made.normalizer.normalize_str("x"), "cabx")
    self.assertEqual(growth.added(fields["normalizer"]), 3)
    made.add_special_tokens(["<s>"])
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> <s> $A <s>", special_tokens=[("<s>", 1)]
    )
    template = json.loads(made.to_str())["post_processor"]
    self.assertLen(made.encode("").ids, growth.added(template))
    growth.check(fields | {"post_processor": template})
    for name, step, message in (
        ("normalizer", {"prepend": "a" * 65}, "normalizer adds 65 characters"),
        (
            "post_processor",
            {"processors": [template | {"single": template["single"] * 30}]},
            "post_processor adds 90 tokens",
        ),
    ):
      with self.assertRaisesRegex(errors.UserError, message):
        growth.check({name: step})


if __name__ == "__main__":
  absltest.main()
