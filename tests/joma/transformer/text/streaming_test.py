"""Pieces make what `decode` makes of all ids at once, whatever the decoder."""

from absl.testing import parameterized
import numpy as np
import pytest

from joma.transformer.text import streaming
from joma.transformer.text import tokenizer as tokenizer_lib
from scansnap_jax.experiment import errors
from tests.joma.transformer.text import tokenizer_test

_TEXT = "The cat: “Olé” (日本語 🙂).\n\n  The end.\n"
_BYTES = (0x41, 0x20, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x99, 0xFF)
_SPACE = "\u2581"
_WORDS = (
    *("<unk>", "<s>", "</s>", "<pad>", "\ufffd", "|", " ", "x ", "é"),
    *(_SPACE, 2 * _SPACE, _SPACE + "The", _SPACE + ".", "king", "'s", "n't"),
    *("##ing", "a</w>", "do", "not", "."),
)


def _decoders():
  decoders = pytest.importorskip("tokenizers").decoders
  to_bytes = (decoders.Replace(_SPACE, " "), decoders.ByteFallback())
  return {
      "llama": decoders.Sequence(
          [*to_bytes, decoders.Fuse(), decoders.Strip(" ", 1, 0)]
      ),
      "gemma": decoders.Sequence([*to_bytes, decoders.Fuse()]),
      "byte_fallback": decoders.ByteFallback(),
      "byte_level": decoders.ByteLevel(),
      "metaspace": decoders.Metaspace(),
      "metaspace_first": decoders.Metaspace(prepend_scheme="first"),
      "metaspace_never": decoders.Metaspace(prepend_scheme="never"),
      "wordpiece": decoders.WordPiece(),
      "suffix": decoders.BPEDecoder(),
      "ctc": decoders.CTC(),
      "none": None,
      "pairs": decoders.Sequence([
          *(decoders.Replace(_SPACE, " "), decoders.Fuse()),
          *(decoders.Replace(" .", "."), decoders.Replace("gx", "!")),
      ]),
      "two_spaces": decoders.Sequence(
          [*to_bytes, decoders.Fuse(), decoders.Strip(" ", 2, 0)]
      ),
      "both_ends": decoders.Sequence(
          [*to_bytes, decoders.Fuse(), decoders.Strip(" ", 1, 1)]
      ),
      "pattern": decoders.Sequence([
          *(decoders.Replace(_SPACE, " "), decoders.Fuse()),
          decoders.Replace(
              pytest.importorskip("tokenizers").Regex("g[nx]"), "N"
          ),
      ]),
  }


def _of_words(decoder):
  """A tokenizer of words and single bytes; `decoder` names how they join."""
  library = pytest.importorskip("tokenizers")
  words = [*_WORDS, *(f"<0x{byte:02X}>" for byte in _BYTES)]
  if decoder == "byte_level":
    # Its tokens are written in letters that stand for bytes.
    words += sorted(library.pre_tokenizers.ByteLevel.alphabet())
  vocab = {word: i for i, word in enumerate(dict.fromkeys(words))}
  made = library.Tokenizer(library.models.WordLevel(vocab, unk_token="<unk>"))
  kind = _decoders()[decoder]
  if kind is not None:
    made.decoder = kind
  made.add_special_tokens(["<s>", "</s>"])
  return tokenizer_lib.Bpe(made.to_str())


def _learned(kind):
  return {
      "bytes": tokenizer_lib.Bytes,
      "words": lambda: tokenizer_lib.learn_words([_TEXT]),
      "bpe": lambda: tokenizer_lib.learn_bpe([_TEXT], 270),
      "byte_fallback": lambda: tokenizer_lib.Bpe(
          tokenizer_test.byte_fallback().to_str()
      ),
  }[kind]()


class StreamTest(parameterized.TestCase):

  def _assert_streams(self, tokenizer, ids, prompt=()):
    stream = streaming.stream_decode(tokenizer, ids, prompt)
    try:
      whole = tokenizer.decode([*prompt, *ids])
    except errors.UserError:  # Of no text the library strips no end.
      self.assertRaises(errors.UserError, list, stream)
      return []
    pieces = list(stream)
    self.assertNotIn("", pieces)
    try:
      before = tokenizer.decode(prompt) if len(prompt) else ""
    except errors.UserError:
      before = ""
    if whole.startswith(before):
      self.assertEqual(before + "".join(pieces), whole, (prompt, ids))
    return pieces

  @parameterized.parameters("bytes", "words", "bpe", "byte_fallback")
  def test_pieces_make_the_text(self, kind):
    pytest.importorskip("tokenizers")
    tokenizer = _learned(kind)
    pieces = self._assert_streams(tokenizer, tokenizer.encode(_TEXT))
    self.assertNotIn("\ufffd", "".join(pieces))

  @parameterized.parameters(
      *("llama", "gemma", "byte_fallback", "byte_level", "metaspace"),
      *("metaspace_first", "metaspace_never", "wordpiece", "suffix", "ctc"),
      *("none", "bytes", "words", "pairs", "two_spaces", "pattern"),
      "both_ends",
  )
  def test_any_ids_behind_any_prompt_make_what_decode_makes(self, kind):
    is_ours = kind in ("bytes", "words")
    tokenizer = _learned(kind) if is_ours else _of_words(kind)
    rng = np.random.default_rng(0)
    for _ in range(40):
      ids = rng.integers(0, tokenizer.vocab_size, rng.integers(12)).tolist()
      cut = rng.integers(len(ids) + 1)
      self._assert_streams(tokenizer, ids[cut:], ids[:cut])
      self._assert_streams(tokenizer, ids)

  @parameterized.parameters(
      ("pairs", ("king", "x ", "do", " ", "."), "kin! do."),
      ("two_spaces", (" ", "king", " ", " ", "do"), "king  do"),
      ("both_ends", (" ", "king", " ", " ", "do", " "), "king  do"),
      ("pattern", ("king", "not", "do", "x "), "kinNotdox "),
  )
  def test_what_is_joined_across_tokens_waits_for_the_next(
      self, kind, words, want
  ):
    tokenizer = _of_words(kind)
    ids = [tokenizer.encode(word, special=False)[0] for word in words]
    self.assertEqual("".join(self._assert_streams(tokenizer, ids)), want)

  def test_a_character_comes_whole_with_its_last_byte(self):
    decoder = streaming.StreamDecoder(tokenizer_lib.Bytes())
    pieces = [decoder.push(byte) for byte in "é🙂x".encode()]
    self.assertEqual(pieces, ["", "é", "", "", "", "🙂", "x"])
    self.assertEqual(decoder.finish(), "")

  def test_tokens_of_bytes_come_when_no_byte_can_spoil_them(self):
    """One that is no UTF-8 makes all of a run replacement characters."""
    tokenizer = _learned("byte_fallback")
    decoder = streaming.StreamDecoder(tokenizer)
    ids = [2 + byte for byte in "é🙂".encode()]
    pieces = [decoder.push(token) for token in [*ids, 261]]
    self.assertEqual(pieces, 6 * [""] + ["é🙂 a"])
    spoiled = self._assert_streams(tokenizer, [*ids, 2 + 0xFF, 261])
    self.assertEqual(spoiled, [7 * "\ufffd" + " a"])

  def test_special_tokens_leave_the_space_after_them(self):
    tokenizer = _learned("byte_fallback")
    self._assert_streams(tokenizer, [1, 261, 1, 1, 262, 1])

  def test_behind_a_prompt_its_text_is_neither_repeated_nor_lost(self):
    encode = lambda text: list(text.encode())
    for prompt, ids, want in (
        # A replacement character of the user's own, and half a character.
        (encode("a\ufffd"), encode("b"), "b"),
        ([*encode("a"), 0xC3], [0xA9, *encode("b")], "éb"),
        ([*encode("a"), 0xC3], encode("b"), "b"),
    ):
      pieces = streaming.stream_decode(tokenizer_lib.Bytes(), ids, prompt)
      self.assertEqual("".join(pieces), want)

  def test_bytes_that_spoil_those_of_a_prompt_leave_it_as_it_stands(self):
    prompt = [2 + byte for byte in "🙂".encode()]
    tokenizer = _learned("byte_fallback")
    pieces = streaming.stream_decode(tokenizer, [2 + 0xFF, 261], prompt)
    self.assertEqual("".join(pieces), "\ufffd a")

  def test_an_unfinished_character_comes_with_the_end(self):
    pieces = self._assert_streams(tokenizer_lib.Bytes(), [65, 0xF0, 0x9F])
    self.assertEqual(pieces, ["A", "\ufffd"])
