"""What a run of `train_lm` refuses before it starts."""

import dataclasses
import pathlib

from absl.testing import absltest
from absl.testing import parameterized

from joma.transformer import config as configs
from joma.transformer.text import corpus as corpus_lib
from joma.transformer.text import tokenizer as tokenizer_lib
from joma.transformer.training import lm_config
from joma.transformer.training import run
from scansnap_jax.experiment import errors


def _config(**model):
  return lm_config.LmConfig(model=configs.TransformerConfig(**model))


class CheckTest(parameterized.TestCase):

  @parameterized.parameters(
      (("key_bias",), "key_bias"), (("softmax", "lightning"), "lightning")
  )
  def test_what_hugging_face_cannot_say_names_what_can(self, entries, named):
    config = _config(attention=entries)
    message = f"--save_hf: .*cannot say attention=.*{named}.*model_type=joma.*"
    with self.assertRaisesRegex(errors.UserError, message + "--save_own"):
      run.check(config, None, True)
    run.check(config, None, False)
    run.check(_config(), None, True)

  @parameterized.parameters(
      ("ssa:scale=1", "ssa has no option 'scale'; its options: start, width"),
      ("moba:k=few", "k must be like 4, got 'few'"),
      ("moba:k=0", "k=0 and block=128 must not be below 1"),
      ("key_bias+sink_logits", "a layer has one at most"),
      ("lightning+moba", "leaves nothing to moba"),
      ("hip", "hip lets later tokens change"),
  )
  def test_entries_that_cannot_be_trained(self, entry, message):
    with self.assertRaisesRegex(errors.UserError, message):
      run.check(_config(attention=(entry,)), None, False)


class VocabularyTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self._root = pathlib.Path(self.create_tempdir().full_path)
    (self._root / "text.txt").write_text("to be or not to be\n" * 99)
    self._workdir = self._root / "run"

  def _number(self, **settings):
    config = lm_config.LmConfig(corpus="text.txt", **settings)
    found, _ = run.with_vocabulary(config, str(self._workdir), str(self._root))
    self.assertEqual(dataclasses.replace(found, model=config.model), config)
    return found.model.vocab_size

  def test_it_is_the_tokenizers(self):
    # to, be, or, not and <unk>.
    self.assertEqual(self._number(tokenizer="words"), 5)
    self.assertEqual(self._number(tokenizer="bytes"), 256)
    words = tokenizer_lib.Words(("<unk>", "to", "be"))
    tokenizer_lib.save(words, self._root)
    self.assertEqual(self._number(tokenizer=str(self._root)), 3)

  def test_a_run_that_goes_on_keeps_its_number(self):
    self._workdir.mkdir()
    path = self._workdir / "config.json"
    for text, number in (
        ('{"lm": {"model": {"vocab_size": 300}}}', 300),
        ('{"lm": {"model": {"vocab_size": "300"}}}', 5),
        ('{"lm": {"model": {"vocab_size": true}}}', 5),
        ('{"lm": []}', 5),
        ("{", 5),
    ):
      path.write_text(text)
      self.assertEqual(self._number(tokenizer="words"), number, text)

  def test_what_was_learned_is_not_learned_again(self):
    config = lm_config.LmConfig(corpus="text.txt", tokenizer="words")
    _, learned = run.with_vocabulary(config, "new", str(self._root))
    given = dict(tokenizer="words", data_dir=self._root)
    loaded = corpus_lib.load("text.txt", learned=learned, **given)
    self.assertIs(loaded.tokenizer, learned.tokenizer)
    (self._root / "text.txt").write_text("not to be\n" * 99)
    loaded = corpus_lib.load("text.txt", learned=learned, **given)
    self.assertEqual(loaded.vocab_size, 4)


if __name__ == "__main__":
  absltest.main()
