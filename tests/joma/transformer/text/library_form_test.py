"""Tests that folders open in other libraries with the same ids and texts."""

import json
import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
import pytest

from joma.transformer.text import library_form
from joma.transformer.text import tokenizer as tokenizer_lib

_NUM_TEXTS = 1000
_PIECES = (
    *("Hello", "the", "THE", " ", "  ", "\n", "\t", "\x1c", "\x00", "\x85"),
    *("<br />", "<br/>", '"', "'s", "...", "a.b", "(x)", ";", ":", "!?"),
    *("ΟΔΟΣ", "ΣΑΣ'", "Σ", "İ", "ß", "É", "\u2028", "\u00a0", "\u200b"),
    *("<unk>", "\ufeff", "日本", "🙂", "e\u0301", "12,345.6"),
)


def _texts():
  """Drawn texts: pieces that the cutting looks at, and single bytes."""
  rng = np.random.default_rng(0)
  draw = lambda pieces: "".join(rng.choice(pieces, rng.integers(0, 30)))
  ascii_ = [chr(i) for i in range(128)]
  return [
      draw(np.array(_PIECES if i % 2 else ascii_, object))
      for i in range(_NUM_TEXTS)
  ]


def _tokenizer(kind):
  pytest.importorskip("tokenizers")
  if kind == "bytes":
    return tokenizer_lib.Bytes()
  if kind == "words":
    return tokenizer_lib.learn_words(_texts()[:300])
  return tokenizer_lib.learn_bpe(_texts()[:300], 400)


class LibraryTest(parameterized.TestCase):

  @parameterized.parameters("bytes", "words")
  def test_the_library_gives_the_same_ids_and_texts(self, kind):
    library = pytest.importorskip("tokenizers")
    ours, folder = _tokenizer(kind), self.create_tempdir().full_path
    tokenizer_lib.save(ours, pathlib.Path(folder))
    theirs = library.Tokenizer.from_file(f"{folder}/tokenizer.json")
    rng = np.random.default_rng(1)
    for text in _texts():
      self.assertEqual(
          theirs.encode(text).ids, ours.encode(text).tolist(), repr(text)
      )
      ids = rng.integers(0, ours.vocab_size, 9).tolist()
      self.assertEqual(theirs.decode(ids), ours.decode(ids), ids)

  def test_only_its_own_description_is_recognised(self):
    fields = json.loads(json.dumps(library_form.of_words(("<unk>", "b", "a"))))
    self.assertEqual(library_form.words_of(fields), ["<unk>", "b", "a"])
    other = fields | {"normalizer": None}
    self.assertIsNone(library_form.words_of(other))
    vocab = {"model": fields["model"] | {"vocab": {"<unk>": 0, "b": 2}}}
    self.assertIsNone(library_form.words_of(fields | vocab))
    self.assertIsNone(library_form.words_of(library_form.of_bytes()))
    self.assertFalse(library_form.is_bytes(fields))


class FolderOfBeforeTest(parameterized.TestCase):

  @parameterized.parameters("bytes", "words")
  def test_it_loads(self, kind):
    folder = pathlib.Path(self.create_tempdir().full_path)
    content = _tokenizer(kind).to_json()
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    self.assertEqual(tokenizer_lib.from_folder(folder).to_json(), content)


@pytest.mark.slow
class TransformersTest(parameterized.TestCase):

  @parameterized.parameters("bytes", "words", "bpe")
  def test_its_tokenizer_gives_the_same_ids_and_texts(self, kind):
    transformers = pytest.importorskip("transformers")
    ours, folder = _tokenizer(kind), self.create_tempdir().full_path
    tokenizer_lib.save(ours, pathlib.Path(folder), max_len=64)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    self.assertEqual(theirs.model_max_length, 64)
    self.assertLen(theirs, ours.vocab_size)
    for text in _texts():
      ids = ours.encode(text).tolist()
      self.assertEqual(theirs(text)["input_ids"], ids, repr(text))
      self.assertEqual(theirs.decode(ids), ours.decode(ids), repr(text))


if __name__ == "__main__":
  absltest.main()
