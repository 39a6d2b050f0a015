import gzip
import hashlib
import pathlib
import sys
import types

from absl.testing import absltest
from absl.testing import parameterized
import pytest

from joma.transformer.text import corpus_text
from scansnap_jax.experiment import errors

_LINES = "".join(f"line {i} of a text\n" for i in range(100))


def _write(folder, **texts):
  folder.mkdir(parents=True, exist_ok=True)
  for name, text in texts.items():
    (folder / name.replace("_", ".")).write_text(text, encoding="utf-8")


def _no_hub(*_, **__):
  raise ConnectionError("no network")


class _CorpusTextTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    patch = pytest.MonkeyPatch()
    self.addCleanup(patch.undo)
    self.hub = types.SimpleNamespace(load_dataset=_no_hub)
    patch.setitem(sys.modules, "datasets", self.hub)


class EmbeddedTest(_CorpusTextTest):

  def test_it_is_tiny_shakespeare(self):
    text = corpus_text.find("tinyshakespeare")
    data = b"".join(text.splits.values())
    self.assertLen(data, 1_115_394)
    self.assertLen(set(data.decode()), 65)
    (digest,) = text.files.values()
    self.assertEqual(digest, hashlib.sha256(data).hexdigest())
    self.assertTrue(data.startswith(b"First Citizen:\n"))

  def test_the_archive_is_small(self):
    folder = pathlib.Path(corpus_text.__file__).parents[1] / "data"
    packed = (folder / "tinyshakespeare.txt.gz").read_bytes()
    self.assertLess(len(packed), 500_000)
    self.assertIn(
        hashlib.sha256(gzip.decompress(packed)).hexdigest(),
        (folder / "README.md").read_text(),
    )


class WikitextTest(_CorpusTextTest):

  @parameterized.product(
      where=("wikitext-2", "wikitext2", "wikitext-2-v1", "."),
      names=("{}_txt", "wiki_{}_tokens"),
      spelt=("wikitext2", "wikitext-2", "WikiText-2-v1"),
  )
  def test_published_names_are_found(self, where, names, spelt):
    texts = {names.format(s): f"{s} text\n" for s in corpus_text.SPLITS}
    _write(self.folder / where, **texts)
    text = corpus_text.find(spelt, data_dir=self.folder)
    self.assertEqual(text.name, "wikitext2")
    self.assertEqual(
        text.splits, {s: f"{s} text\n".encode() for s in corpus_text.SPLITS}
    )
    self.assertLen(text.files, 3)
    self.assertIs(text.is_published, False)  # And the log says so.

  def test_raw_text_is_another_corpus(self):
    texts = {f"wiki_{s}_raw": s for s in corpus_text.SPLITS}
    _write(self.folder / "wikitext-103-raw", **texts)
    text = corpus_text.find("wikitext103-raw", data_dir=self.folder)
    self.assertEqual(text.name, "wikitext103-raw")
    self.assertIsNone(text.is_published)
    with self.assertRaises(errors.UserError):
      corpus_text.find("wikitext103", data_dir=self.folder)

  def test_what_was_looked_for_is_named_and_nothing_else_is_taken(self):
    for other in ("wikitext-103", "tinyshakespeare"):
      texts = {f"{s}_txt": s for s in corpus_text.SPLITS}
      _write(self.folder / other, **texts)
    _write(self.folder / "wikitext-2", train_txt="x", valid_txt="x")
    with self.assertRaises(errors.UserError) as caught:
      corpus_text.find("wikitext2", data_dir=self.folder)
    for wanted in (
        "--corpus=wikitext2",
        "train.txt, valid.txt, test.txt",
        "wiki.train.tokens, wiki.valid.tokens, wiki.test.tokens",
        str(self.folder / "wikitext-2"),
        "ConnectionError: no network",
    ):
      self.assertIn(wanted, str(caught.exception))

  def test_a_folder_named_after_another_corpus_is_not_taken(self):
    folder = self.folder / "wikitext-103"
    _write(folder, **{f"{s}_txt": s for s in corpus_text.SPLITS})
    with self.assertRaises(errors.UserError):
      corpus_text.find("wikitext2", data_dir=folder)
    text = corpus_text.find("wikitext103", data_dir=folder)
    self.assertEqual(text.splits["valid"], b"valid")

  def test_without_a_folder_the_flag_is_named(self):
    with self.assertRaisesRegex(errors.UserError, "give --data_dir"):
      corpus_text.find("wikitext2")

  def test_the_hub_gives_the_lines_of_the_files(self):
    asked = []

    def load_dataset(path, name, split):
      asked.append((path, name, split))
      return {"text": ["", " = A = \n", "", " b c \n"]}

    self.hub.load_dataset = load_dataset
    text = corpus_text.find("wikitext2", data_dir=self.folder)
    self.assertEqual(text.splits["valid"], b" \n = A = \n \n b c \n")
    self.assertEqual(
        asked,
        [
            ("Salesforce/wikitext", "wikitext-2-v1", split)
            for split in ("train", "validation", "test")
        ],
    )


class PathTest(_CorpusTextTest):

  def test_a_file_is_cut_at_line_ends_and_nothing_is_lost(self):
    path = self.folder / "a.txt"
    path.write_text(_LINES)
    text = corpus_text.find(str(path), fractions=(0.6, 0.3, 0.1))
    self.assertEqual(b"".join(text.splits.values()).decode(), _LINES)
    lines = [len(split.splitlines()) for split in text.splits.values()]
    for actual, share in zip(lines, (60, 30, 10), strict=True):
      self.assertAlmostEqual(actual, share, delta=1.5)  # Line of the cut.
    for split in text.splits.values():
      self.assertTrue(split.endswith(b"\n"))
    self.assertEqual(text.fractions, (0.6, 0.3, 0.1))

  def test_a_share_that_ends_at_a_line_end_is_exact(self):
    (self.folder / "a.txt").write_text("abc\n" * 4)
    text = corpus_text.find(
        "a.txt", data_dir=self.folder, fractions=(0.5, 0.25, 0.25)
    )
    lengths = [len(split) for split in text.splits.values()]
    self.assertEqual(lengths, [8, 4, 4])

  def test_one_line_is_cut_between_characters(self):
    path = self.folder / "a.txt"
    path.write_text("日本語" * 50, encoding="utf-8")
    text = corpus_text.find("a.txt", data_dir=self.folder)
    decoded = [split.decode() for split in text.splits.values()]
    self.assertEqual("".join(decoded), "日本語" * 50)
    self.assertNotIn("", decoded)

  def test_a_folder_with_splits_keeps_them(self):
    _write(self.folder, wiki_train_tokens="a", wiki_valid_tokens="b")
    text = corpus_text.find(str(self.folder))
    expected = {"train": b"a", "valid": b"b", "test": b""}
    self.assertEqual(text.splits, expected)
    self.assertIsNone(text.fractions)

  def test_a_folder_of_texts_is_read_in_order(self):
    _write(self.folder, b_txt="2", a_md="1\n", c_png="no")
    _write(self.folder / "d", e_txt="3\n")
    text = corpus_text.find(str(self.folder), fractions=(1.0, 0.0, 0.0))
    self.assertEqual(text.splits["train"], b"1\n2\n3\n")
    self.assertLen(text.files, 3)

  def test_train_without_valid_is_not_mixed_with_test(self):
    _write(self.folder, train_txt="a", test_txt="b")
    with self.assertRaisesRegex(errors.UserError, "lacks .*valid.txt"):
      corpus_text.find(str(self.folder))

  def test_what_is_not_there_is_named(self):
    with self.assertRaisesRegex(errors.UserError, "wikitext103.*looked for"):
      corpus_text.find("nothing.txt", data_dir=self.folder)
    with self.assertRaisesRegex(errors.UserError, "holds no text"):
      corpus_text.find(str(self.folder))
    (self.folder / "empty.txt").touch()
    with self.assertRaisesRegex(errors.UserError, "empty.txt is empty"):
      corpus_text.find("empty.txt", data_dir=self.folder)

  @parameterized.parameters((0.9, 0.1), (0.9, 0.2, 0.1), (1.1, -0.1, 0.0))
  def test_fractions_must_be_shares(self, *fractions):
    with self.assertRaisesRegex(errors.UserError, "three shares"):
      corpus_text.find("tinyshakespeare", fractions=fractions)


class BlocksTest(absltest.TestCase):

  def test_blocks_are_whole_lines_and_lose_nothing(self):
    patch = pytest.MonkeyPatch()
    self.addCleanup(patch.undo)
    patch.setattr(corpus_text, "_BLOCK", 50)
    found = list(corpus_text.blocks(_LINES.encode() + "é".encode()))
    self.assertEqual("".join(found), _LINES + "é")
    self.assertGreater(len(found), 10)
    self.assertTrue(all(block.endswith("\n") for block in found[:-1]))

  def test_the_place_that_is_no_text_is_named(self):
    with self.assertRaisesRegex(errors.UserError, "not at byte 3"):
      list(corpus_text.blocks(b"ab\n\xff"))


if __name__ == "__main__":
  absltest.main()
