"""Byte and word tokenizers as the `tokenizers` library describes them.

A folder in this form opens in `transformers` (`AutoTokenizer`, `pipeline`) with
the same ids and texts. The library is not needed to write or recognise it:
https://huggingface.co/docs/tokenizers/api/tokenizer.
"""

from collections.abc import Mapping, Sequence
import functools
import json
from typing import Any

# What `basic_english` of `tokenizer` does, in its order.
_SPACED = "'.,()!?"
# Python lowers a capital sigma that ends a word to another letter. What stands
# between it and the word's other letters has no case, as an apostrophe.
_CASED = r"[\p{Lu}\p{Ll}\p{Lt}]"
_IGNORED = r"[\p{Mn}\p{Me}\p{Cf}\p{Lm}\p{Sk}'’.:·]"
_BEFORE = "|".join(_CASED + n * _IGNORED for n in range(4))
_LAST_SIGMA = f"(?<={_BEFORE})Σ(?!{_IGNORED}*{_CASED})"
# Python splits at these four separators, too.
_SEPARATORS = "[\\x{1C}-\\x{1F}]"


def of_bytes() -> dict[str, Any]:
  """Returns the description of the tokenizer whose ids are bytes."""
  vocab = {char: byte for byte, char in enumerate(_byte_chars())}
  model = {"type": "BPE", "vocab": vocab, "merges": []}
  return _described(model, pre_tokenizer=_byte_level(), decoder=_byte_level())


def of_words(words: Sequence[str]) -> dict[str, Any]:
  """Returns the description of words cut as `basic_english` cuts them.

  Args:
    words: The word of each id, the unknown one first.
  """
  model = {
      "type": "WordLevel",
      "vocab": {word: i for i, word in enumerate(words)},
      "unk_token": words[0],
  }
  normalizer = {"type": "Sequence", "normalizers": _normalizers()}
  return _described(
      model, normalizer=normalizer, pre_tokenizer={"type": "WhitespaceSplit"}
  )


def is_bytes(fields: Mapping[str, Any]) -> bool:
  """Whether a description is that of `of_bytes`."""
  return fields == of_bytes()


def words_of(fields: Mapping[str, Any]) -> list[str] | None:
  """Returns the words of a description by `of_words`; None for any other."""
  model = fields.get("model")
  if not isinstance(model, dict) or model.get("type") != "WordLevel":
    return None
  vocab = model.get("vocab")
  if not isinstance(vocab, dict) or not vocab:
    return None
  words = sorted(vocab, key=lambda word: (str(vocab[word]), word))
  if [*vocab.values()] == [*range(len(vocab))]:
    words = [*vocab]
  return words if fields == of_words(words) else None


def settings(max_len: int | None) -> str:
  """Returns the content of tokenizer_config.json.

  Args:
    max_len: Longest text of the model, in tokens; None where any fits.
  """
  fields: dict[str, Any] = {
      "tokenizer_class": "PreTrainedTokenizerFast",
      "clean_up_tokenization_spaces": False,
  }
  if max_len is not None:
    fields["model_max_length"] = max_len
  return json.dumps(fields, indent=2)


def _described(model: Mapping[str, Any], **parts: Any) -> dict[str, Any]:
  empty = ("truncation", "padding", "normalizer", "pre_tokenizer")
  nothing = dict.fromkeys((*empty, "post_processor", "decoder"))
  return {
      "version": "1.0",
      "added_tokens": [],
      **nothing,
      **parts,
      "model": dict(model),
  }


def _byte_level() -> dict[str, Any]:
  return {
      "type": "ByteLevel",
      "add_prefix_space": False,
      "trim_offsets": False,
      "use_regex": False,
  }


@functools.cache
def _byte_chars() -> tuple[str, ...]:
  """The character that stands for each byte in GPT-2's alphabet.

  A byte that is a printable character of Latin-1 stands for itself; the others
  follow one another from U+0100 on.
  """
  printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
  others = iter(range(0x100, 0x200))
  return tuple(
      chr(byte if byte in printable else next(others)) for byte in range(256)
  )


def _normalizers() -> list[dict[str, Any]]:
  replace = lambda pattern, content: {
      "type": "Replace",
      "pattern": pattern,
      "content": content,
  }
  return [
      replace({"Regex": _LAST_SIGMA}, "ς"),
      {"type": "Lowercase"},
      replace({"String": '"'}, ""),
      replace({"String": "<br />"}, " "),
      *(replace({"String": char}, f" {char} ") for char in _SPACED),
      replace({"Regex": "[;:]"}, " "),
      replace({"Regex": _SEPARATORS}, " "),
  ]
