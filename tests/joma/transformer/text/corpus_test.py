import io
import json
import os
import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
import pytest

from joma.transformer.text import corpus as corpus_lib
from joma.transformer.text import tokenizer as tokenizer_lib
from scansnap_jax.experiment import errors

_ROOT = pathlib.Path(__file__).parents[4]
_SHARED = pathlib.Path(os.environ.get("SCANSNAP_SHARED", _ROOT / "../shared"))
_TEXT = "".join(f"the {i}th line, of many.\n" for i in range(200))


class CorpusTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.path = self.folder / "a.txt"
    self.path.write_text(_TEXT)
    self.cache = self.folder / "cache"

  def _load(self, tokenizer="words", **kwargs):
    if tokenizer == "bpe":
      pytest.importorskip("tokenizers")
    return corpus_lib.load(
        str(self.path), tokenizer=tokenizer, bpe_vocab_size=270, **kwargs
    )

  @parameterized.parameters("bytes", "words", "bpe")
  def test_ids_are_those_of_the_text(self, kind):
    corpus = self._load(kind)
    self.assertEqual(corpus.tokenizer.name, kind)
    ids = np.concatenate([corpus.train, corpus.valid, corpus.test])
    self.assertEqual(ids.dtype, np.uint16)
    self.assertLess(ids.max(), corpus.vocab_size)
    if kind != "words":
      self.assertEqual(corpus.tokenizer.decode(ids), _TEXT)

  def test_ids_of_a_large_vocabulary_keep_their_value(self):
    class Large(tokenizer_lib.Bytes):
      vocab_size = 2**16 + 1

      def encode(self, text):
        return np.full(len(text), 2**16, np.int32)

    corpus = self._load(Large())
    self.assertEqual(set(np.asarray(corpus.train)), {2**16})

  def test_words_are_learned_of_train_alone(self):
    corpus = self._load("words")
    self.assertIn("3th", corpus.tokenizer.words)
    self.assertNotIn("199th", corpus.tokenizer.words)
    self.assertIn(0, corpus.test)
    self.assertNotIn(0, corpus.train)

  @parameterized.parameters("bytes", "words", "bpe")
  def test_a_second_load_maps_what_the_first_wrote(self, kind):
    first = self._load(kind, cache_dir=self.cache)
    written = {p: p.stat().st_mtime_ns for p in self.cache.iterdir()}
    second = self._load(kind, cache_dir=self.cache)
    self.assertEqual(
        written, {p: p.stat().st_mtime_ns for p in self.cache.iterdir()}
    )
    self.assertIsInstance(second.train, np.memmap)
    for split in ("train", "valid", "test"):
      expected = getattr(self._load(kind), split)
      for corpus in (first, second):
        np.testing.assert_array_equal(getattr(corpus, split), expected)
    self.assertEqual(first.facts(), second.facts())

  @parameterized.parameters("bytes", "words")
  def test_a_changed_text_is_encoded_anew(self, kind):
    self._load(kind, cache_dir=self.cache)
    self.path.write_text(_TEXT.replace("many", "lots"))
    corpus = self._load(kind, cache_dir=self.cache)
    expected = self._load(kind)
    self.assertIn("lots", corpus.tokenizer.decode(corpus.train))
    np.testing.assert_array_equal(corpus.train, expected.train)
    self.assertEqual(corpus.facts(), expected.facts())

  def test_another_tokenizer_does_not_find_the_ids_of_the_first(self):
    self._load("bytes", cache_dir=self.cache)
    corpus = self._load("words", cache_dir=self.cache)
    np.testing.assert_array_equal(corpus.train, self._load("words").train)

  def test_a_file_cut_short_is_written_anew(self):
    expected = np.array(self._load("bytes", cache_dir=self.cache).train)
    for path in self.cache.glob("*.npy"):
      path.write_bytes(path.read_bytes()[:-5])
    corpus = self._load("bytes", cache_dir=self.cache)
    np.testing.assert_array_equal(corpus.train, expected)

  def test_a_folder_gives_its_tokenizer(self):
    tokenizer = tokenizer_lib.learn_words(["line the"])
    tokenizer_lib.save(tokenizer, self.folder)
    corpus = self._load(str(self.folder))
    self.assertEqual(corpus.vocab_size, 3)
    self.assertEqual(corpus.facts(), self._load(tokenizer).facts())

  def test_an_unknown_tokenizer_is_named(self):
    with self.assertRaisesRegex(errors.UserError, "tokenizer=word is none of"):
      self._load("word")

  def test_large_vocabularies_have_wide_ids(self):
    words = tokenizer_lib.Words(("<unk>", *map(str, range(70_000)), "line"))
    corpus = self._load(words)
    self.assertEqual(corpus.train.dtype, np.int32)
    self.assertEqual(corpus.train.max(), 70_001)

  def test_facts_are_json_and_name_everything(self):
    facts = self._load("words").facts()
    self.assertEqual(json.loads(json.dumps(facts)), facts)
    self.assertEqual(facts["corpus"], str(self.path))
    self.assertLen(facts["files"][str(self.path)], 64)
    self.assertEqual(facts["fractions"], [0.9, 0.05, 0.05])
    # The line holds: the, i-th, line, a comma, of, many, a full stop.
    self.assertEqual(sum(facts["num_tokens"].values()), 7 * 200)

  @parameterized.parameters("bit", "cut", "other shape", "no checksum")
  def test_ids_that_were_damaged_are_made_again(self, damage):
    expected = self._load("bpe", cache_dir=self.cache).train.copy()
    (path,) = self.cache.glob("train-*.npy")
    data = bytearray(path.read_bytes())
    if damage == "bit":
      data[-1] ^= 1
    elif damage == "cut":
      data = data[:-2]
    elif damage == "other shape":
      buffer = io.BytesIO()
      np.save(buffer, expected[:3])
      data = buffer.getvalue()
    else:
      path.with_name(path.name + ".crc32").unlink()
    path.write_bytes(data)
    again = self._load("bpe", cache_dir=self.cache).train
    np.testing.assert_array_equal(again, expected)

  def test_a_learned_tokenizer_that_was_damaged_is_learned_again(self):
    facts = self._load("bpe", cache_dir=self.cache).facts()
    (path,) = self.cache.glob("bpe-*.json")
    path.write_text(path.read_text().replace('"the"', '"eht"', 1)[:-5])
    self.assertEqual(self._load("bpe", cache_dir=self.cache).facts(), facts)


@pytest.mark.realdata
class WikitextTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.data_dir = _SHARED / "data"
    if not (self.data_dir / "wikitext-2" / "train.txt").exists():
      self.skipTest("needs data/wikitext-2 in SCANSNAP_SHARED")

  @pytest.mark.slow
  def test_words_are_those_of_the_published_runs(self):
    corpus = corpus_lib.load(
        "wikitext2", tokenizer="words", data_dir=self.data_dir
    )
    facts = corpus.facts()
    self.assertIs(facts["is_published"], True)
    self.assertEqual(facts["vocab_size"], 28_782)
    self.assertEqual(
        facts["num_tokens"],
        {"train": 2_049_990, "valid": 214_417, "test": 241_859},
    )
    # <unk>, of which the text has 54,625, then by frequency.
    self.assertEqual(np.count_nonzero(corpus.train == 0), 54_625)
    first = corpus.tokenizer.words[:5]
    self.assertEqual(first, ("<unk>", "the", ",", ".", "of"))

  def test_bytes_are_the_file(self):
    corpus = corpus_lib.load(str(self.data_dir / "wikitext-2"))
    self.assertLen(corpus.train, 10_797_148)
    self.assertLen(corpus.valid, 1_121_681)
    self.assertLen(corpus.test, 1_256_449)


if __name__ == "__main__":
  absltest.main()
