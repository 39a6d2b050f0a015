import json
import os
import pathlib
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
import pytest

from joma.transformer.hf import pretrained
from joma.transformer.text import tokenizer as tokenizer_lib
from scansnap_jax.experiment import errors

_TEXT = (
    'The cat said: "¡Olé, señor!" (the dog slept; 日本語 🙂).\n\n  The end.\n'
)


def _bpe(vocab_size=300, text=_TEXT * 3):
  pytest.importorskip("tokenizers")
  return tokenizer_lib.learn_bpe([text], vocab_size)


def byte_fallback():
  """As Llama's: a few pieces, other characters byte by byte."""
  library = pytest.importorskip("tokenizers")
  pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
  pieces += ["▁", "a", "b", "▁a", "▁b"]
  vocab = {piece: i for i, piece in enumerate(pieces)}
  merges = [("▁", "a"), ("▁", "b")]
  tokenizer = library.Tokenizer(
      library.models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True)
  )
  tokenizer.normalizer = library.normalizers.Sequence([
      library.normalizers.Prepend("▁"),
      library.normalizers.Replace(" ", "▁"),
  ])
  decoders = library.decoders
  tokenizer.decoder = decoders.Sequence([
      decoders.Replace("▁", " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(" ", 1, 0),
  ])
  tokenizer.add_special_tokens(["<s>"])
  tokenizer.post_processor = library.processors.TemplateProcessing(
      single="<s> $A", special_tokens=[("<s>", 1)]
  )
  return tokenizer


class BasicEnglishTest(parameterized.TestCase):

  @parameterized.parameters(
      ("It's He (she) said: go; NOW!", "it ' s he ( she ) said go now !"),
      ('"To be," he-said. why?', "to be , he-said . why ?"),
      ("a<br />b 3.14 @-@ <unk>", "a b 3 . 14 @-@ <unk>"),
      (" \n\t\u3000= x =\x85y", "= x = y"),
      ("", ""),
  )
  def test_words(self, text, expected):
    self.assertEqual(tokenizer_lib.basic_english(text), expected.split())


class WordsTest(parameterized.TestCase):

  def test_ids_are_by_falling_frequency_then_by_characters(self):
    words = tokenizer_lib.learn_words(["b a a c", "<unk> B <unk> <unk> z"])
    self.assertEqual(words.words, ("<unk>", "a", "b", "c", "z"))
    self.assertEqual(words.vocab_size, 5)
    words = tokenizer_lib.learn_words(["c b a d d"])
    self.assertEqual(words.words, ("<unk>", "d", "a", "b", "c"))

  def test_unknown_words_and_the_word_unk_are_id_0(self):
    words = tokenizer_lib.learn_words(["a b b"])
    ids = words.encode("A never <unk>\nb.")
    np.testing.assert_array_equal(ids, [2, 0, 0, 1, 0])
    self.assertEqual(ids.dtype, np.int32)
    self.assertEqual(words.decode(ids), "a <unk> <unk> b <unk>")

  @parameterized.parameters(((),), (("a", "<unk>"),), (("<unk>", "a", "a"),))
  def test_impossible_vocabularies_are_refused(self, words):
    with self.assertRaises(errors.UserError):
      tokenizer_lib.Words(words)

  @parameterized.parameters(-1, 5)
  def test_an_id_outside_of_the_vocabulary_is_named(self, wrong):
    words = tokenizer_lib.learn_words(["b a a c z"])
    with self.assertRaisesRegex(errors.UserError, rf"\[0, 5\), got {wrong}"):
      words.decode([0, wrong])


class BpeTest(parameterized.TestCase):

  def test_any_text_comes_back(self):
    bpe = _bpe()
    for text in (_TEXT, "", "x", "\x00\r\n \t", "unseen Ω words"):
      ids = bpe.encode(text)
      self.assertEqual(ids.dtype, np.int32)
      self.assertEqual(bpe.decode(ids), text)
    self.assertLess(len(bpe.encode(_TEXT)), len(_TEXT.encode()))
    self.assertEqual(bpe.vocab_size, 300)

  def test_learning_twice_gives_the_same(self):
    self.assertEqual(_bpe().to_json(), _bpe().to_json())

  def test_a_vocabulary_without_all_bytes_is_refused(self):
    with self.assertRaisesRegex(errors.UserError, "256 ids or more, got 255"):
      tokenizer_lib.learn_bpe([_TEXT], 255)

  def test_special_tokens_are_those_of_the_file_and_nothing_is_cut(self):
    library = byte_fallback()
    library.enable_truncation(3)
    library.enable_padding(length=20)
    bpe = tokenizer_lib.Bpe(library.to_str())
    ids = bpe.encode("a b a b")
    self.assertEqual(ids.tolist(), [1, 261, 262, 261, 262])
    self.assertEqual(bpe.decode(ids), "a b a b")
    self.assertEqual(bpe.vocab_size, 263)

  def test_ids_of_no_token_decode_to_nothing(self):
    bpe = _bpe()
    self.assertEqual(bpe.decode([*bpe.encode("ab"), 5000]), "ab")


class SaveTest(parameterized.TestCase):

  def _folder(self):
    return pathlib.Path(self.create_tempdir().full_path)

  @parameterized.parameters("bytes", "words", "bpe")
  def test_what_is_saved_comes_back_byte_for_byte(self, kind):
    tokenizer = {
        "bytes": tokenizer_lib.Bytes,
        "words": lambda: tokenizer_lib.learn_words([_TEXT]),
        "bpe": _bpe,
    }[kind]()
    folder = self._folder()
    tokenizer_lib.save(tokenizer, folder)
    again = tokenizer_lib.from_folder(folder)
    self.assertEqual(again.name, kind)
    self.assertEqual(again.vocab_size, tokenizer.vocab_size)
    self.assertEqual(again.to_json(), tokenizer.to_json())
    np.testing.assert_array_equal(again.encode(_TEXT), tokenizer.encode(_TEXT))

  def test_a_folder_without_one_is_named_with_what_it_holds(self):
    folder = self._folder()
    (folder / "tokenizer.model").write_text("x")
    with self.assertRaisesRegex(errors.UserError, "holds tokenizer.model"):
      tokenizer_lib.from_folder(folder)

  def test_a_folder_that_is_not_there_and_a_file_are_named(self):
    folder = self._folder()
    with self.assertRaisesRegex(errors.UserError, "There is no folder .*/none"):
      tokenizer_lib.from_folder(folder / "none")
    file = folder / "tokenizer.json"
    file.write_text("{}")
    with self.assertRaisesRegex(errors.UserError, "json is a file: give the"):
      tokenizer_lib.from_folder(file)

  def test_what_makes_a_folder_of_a_gguf_file_is_said(self):
    folder = self._folder()
    (folder / "model.Q4.gguf").write_bytes(b"GGUF")
    said = r"holds model\.Q4\.gguf\. Of .*gguf_file='model\.Q4\.gguf'"
    with self.assertRaisesRegex(errors.UserError, said):
      tokenizer_lib.from_folder(folder)
    with self.assertRaisesRegex(errors.UserError, "no config.*gguf_file="):
      pretrained.load(folder)

  @parameterized.parameters("{", "[]", '{"kind": "words"}', '{"model": {}}')
  def test_a_damaged_file_is_named(self, content):
    pytest.importorskip("tokenizers")
    folder = self._folder()
    (folder / "tokenizer.json").write_text(content)
    with self.assertRaisesRegex(errors.UserError, "tokenizer.json: "):
      tokenizer_lib.from_folder(folder)


class RefusedTest(parameterized.TestCase):

  @parameterized.parameters("bytes", "words", "bpe")
  def test_lone_surrogates_are_refused(self, kind):
    learned = {
        "bytes": tokenizer_lib.Bytes,
        "words": lambda: tokenizer_lib.learn_words(["a b"]),
        "bpe": _bpe,
    }
    with self.assertRaisesRegex(errors.UserError, "lone surrogates"):
      learned[kind]().encode("a \udcff b")


class JsonTest(absltest.TestCase):

  def test_words_are_readable_json(self):
    words = tokenizer_lib.learn_words(["日本 日本 ω"])
    fields = json.loads(words.to_json())
    self.assertEqual(fields["words"], ["<unk>", "日本", "ω"])
    self.assertIn("日本", words.to_json())


class PanicTest(absltest.TestCase):

  def test_a_panic_is_one_sentence_and_nothing_else_is_shown(self):
    """Rust's panic writes a page to the process's standard error by itself."""
    library = pytest.importorskip("tokenizers")
    made = library.Tokenizer(library.models.BPE(vocab={"a": 0}, merges=[]))
    made.normalizer = library.normalizers.Replace(library.Regex("(a+)+$"), "b")
    tokenizer = tokenizer_lib.from_json(made.to_str())
    with tempfile.TemporaryFile() as shown:
      kept = os.dup(2)
      os.dup2(shown.fileno(), 2)
      try:
        with self.assertRaisesRegex(errors.UserError, "it fails: Onig"):
          tokenizer.encode("a" * 40 + "c")
        os.write(2, b"still there")
      finally:
        os.dup2(kept, 2)
        os.close(kept)
      shown.seek(0)
      self.assertEqual(shown.read(), b"still there")


if __name__ == "__main__":
  absltest.main()
