"""Text to token ids and back: by bytes, by words, or by `tokenizers` BPE.

Three kinds with one small interface, `Tokenizer`; each is one JSON text. A
folder by `save` opens in transformers, too; `from_folder` reads it as that of
any Hugging Face model. `streaming` turns ids into text as they come.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
import dataclasses
import functools
import importlib
import json
import pathlib
from typing import Any, Protocol, SupportsIndex, runtime_checkable

from jaxtyping import Int, Integer
import numpy as np

from joma.transformer.hf import hub
from joma.transformer.text import growth
from joma.transformer.text import library_form
from joma.transformer.text import panics
from scansnap_jax.experiment import json_file
from scansnap_jax.experiment import workdir
from scansnap_jax.experiment.errors import UserError

Ids = Sequence[SupportsIndex] | Integer[np.ndarray, "T"]

KINDS = ("bytes", "words", "bpe")
UNKNOWN = "<unk>"

_FILE = "tokenizer.json"
_SETTINGS = "tokenizer_config.json"
# What `basic_english` does to single characters; the rest stays.
_SPACED = {
    **{ord(char): f" {char} " for char in "'.,()!?"},
    **{ord(char): " " for char in ";:"},
}


@runtime_checkable
class Tokenizer(Protocol):
  """What every kind offers.

  Attributes:
    name: `bytes`, `words` or `bpe`.
    vocab_size: V; ids lie in [0, V).
    spoiler: Id of a byte that makes single bytes right before it, which would
      be text, replacement characters; None where no token does.
  """

  @property
  def name(self) -> str:
    """The kind."""
    ...

  @property
  def vocab_size(self) -> int:
    """V."""
    ...

  @property
  def spoiler(self) -> int | None:
    """What may change the text of ids before it."""
    ...

  def encode(self, text: str, *, special: bool = True) -> Int[np.ndarray, "T"]:
    """Returns the int32 ids of a text.

    Args:
      text: Any.
      special: Whether tokens that mark the ends of a text are added, where the
        tokenizer has some.
    """
    ...

  def decode(self, ids: Ids) -> str:
    """Returns the text of ids; bytes that are no UTF-8 become U+FFFD."""
    ...

  def to_json(self) -> str:
    """Returns all there is to know, as the content of tokenizer.json."""
    ...


@dataclasses.dataclass(frozen=True)
class Bytes:
  """UTF-8 bytes: any text, nothing to learn, V = 256."""

  name = "bytes"
  vocab_size = 256
  spoiler = None

  def encode(self, text: str, *, special: bool = True) -> Int[np.ndarray, "T"]:
    """Returns the bytes of the text as int32; none is special."""
    del special
    check_text(text)
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

  def decode(self, ids: Ids) -> str:
    """Returns the text of bytes."""
    return bytes(_checked(ids, 256).tolist()).decode(errors="replace")

  def to_json(self) -> str:
    """Returns the kind alone."""
    return json.dumps({"kind": self.name})


@dataclasses.dataclass(frozen=True)
class Words:
  """Words as `basic_english` cuts them; what it does not know is <unk>, id 0.

  Attributes:
    words: The word of each id; the first is <unk>.
  """

  words: tuple[str, ...]
  name = "words"
  spoiler = None

  def __post_init__(self):
    if not self.words or self.words[0] != UNKNOWN:
      raise UserError(f"The first word must be {UNKNOWN}.")
    if len(self._index) < len(self.words):
      raise UserError("A word occurs twice in the vocabulary.")

  @functools.cached_property
  def _index(self) -> dict[str, int]:
    return {word: i for i, word in enumerate(self.words)}

  @property
  def vocab_size(self) -> int:
    """V, <unk> included."""
    return len(self.words)

  def encode(self, text: str, *, special: bool = True) -> Int[np.ndarray, "T"]:
    """Returns the ids of the words of a text; none is special."""
    del special
    check_text(text)
    ids = (self._index.get(word, 0) for word in basic_english(text))
    return np.fromiter(ids, np.int32)

  def decode(self, ids: Ids) -> str:
    """Returns the words with a space between; case and quotes are lost."""
    checked = _checked(ids, self.vocab_size)
    return " ".join(self.words[i] for i in checked.tolist())

  def to_json(self) -> str:
    """Returns the words in the order of their ids."""
    fields = {"kind": self.name, "words": self.words}
    return json.dumps(fields, ensure_ascii=False)


class Bpe:
  """A tokenizer of the `tokenizers` library, whatever its model is."""

  name = "bpe"

  def __init__(self, content: str):
    """Reads the content of a tokenizer.json.

    Args:
      content: What `to_json` gave, or Hugging Face wrote. Cutting and padding
        to a length, which such a file may ask for, is switched off.

    Raises:
      UserError: `tokenizers` is not installed, or cannot read it.
    """
    library = _tokenizers()
    with panics.as_errors():
      self._tokenizer = library.Tokenizer.from_str(content)
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()

  @functools.cached_property
  def vocab_size(self) -> int:
    """V: one more than the largest id, added tokens included."""
    return 1 + max(self._tokenizer.get_vocab(True).values(), default=-1)

  @functools.cached_property
  def decoder(self) -> dict[str, Any]:
    """What joins tokens, as tokenizer.json describes it; empty for nothing."""
    found = self._tokenizer.decoder
    return {} if found is None else json.loads(found.__getstate__())

  @functools.cached_property
  def spoiler(self) -> int | None:
    """A byte that begins a character: none is whole that ends with it."""
    names = (f"<0x{byte:02X}>" for byte in range(0xFF, 0xBF, -1))
    ids = map(self._tokenizer.token_to_id, names)
    return next((token for token in ids if token is not None), None)

  def encode(self, text: str, *, special: bool = True) -> Int[np.ndarray, "T"]:
    """Returns ids, with the special tokens that tokenizer.json adds itself.

    Args:
      text: Any; special tokens that it spells out are taken as such.
      special: Whether any are added.

    Raises:
      UserError: The text has lone surrogates, or the tokenizer fails on it.
    """
    check_text(text)
    with panics.as_errors():
      found = self._tokenizer.encode(text, add_special_tokens=special)
      return np.asarray(found.ids, np.int32)

  def decode(self, ids: Ids) -> str:
    """Returns the text without special tokens and ids that stand for nothing.

    A model's output layer may have more rows than there are tokens.
    """
    with panics.as_errors():
      return self._tokenizer.decode(_checked(ids, 2**32).tolist())

  def to_json(self) -> str:
    """Returns the library's own JSON."""
    return self._tokenizer.to_str()


def basic_english(text: str) -> list[str]:
  """Cuts a text into words as the runs of Scan & Snap and JoMA did.

  All is lower case; double quotes vanish; each of ' . , ( ) ! ? is a word of
  its own; `<br />`, ; and : are spaces; the rest is cut at spaces. That is the
  normalisation `basic_english` of torchtext
  (https://pytorch.org/text/stable/data_utils.html). On the words of WikiText-2
  it gives 28,782 kinds and 2,049,990 tokens, the numbers of those runs: line
  ends are no token, and <unk>, which the text spells out, is a word like any.
  """
  text = text.lower().replace('"', "").replace("<br />", " ")
  return text.translate(_SPACED).split()


def learn_words(blocks: Iterable[str]) -> Words:
  """Makes the vocabulary of a text: <unk>, then by falling frequency.

  Words of one frequency are in the order of their characters.

  Args:
    blocks: The text, cut between words.
  """
  counts = Counter()
  for block in blocks:
    counts.update(basic_english(block))
  counts.pop(UNKNOWN, None)
  ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
  return Words((UNKNOWN, *(word for word, _ in ordered)))


def learn_bpe(blocks: Iterable[str], vocab_size: int) -> Bpe:
  """Learns byte-level BPE, as GPT-2's: any text, and back without loss.

  Args:
    blocks: The text, cut anywhere.
    vocab_size: V at most, at least 256; fewer where the text has no more
      pairs.

  Raises:
    UserError: `vocab_size` is too small, or `tokenizers` is not installed.
  """
  if vocab_size < 256:
    raise UserError(
        f"A byte-level vocabulary has 256 ids or more, got {vocab_size}."
    )
  library = _tokenizers()
  byte_level = library.pre_tokenizers.ByteLevel
  tokenizer = library.Tokenizer(library.models.BPE())
  tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
  tokenizer.decoder = library.decoders.ByteLevel()
  trainer = library.trainers.BpeTrainer(
      vocab_size=vocab_size,
      initial_alphabet=sorted(byte_level.alphabet()),
      show_progress=False,
  )
  tokenizer.train_from_iterator(blocks, trainer)
  return Bpe(tokenizer.to_str())


def from_json(content: str) -> Tokenizer:
  """Makes the tokenizer that `to_json` described, or a Hugging Face one.

  Raises:
    UserError: The content describes none.
  """
  fields = json_file.parse_object(content, "A tokenizer's description")
  growth.check(fields)
  kind = fields.get("kind", "bpe")
  if kind == "bytes":
    return Bytes()
  if kind == "words":
    words = fields.get("words", ())
    if not isinstance(words, list) or not all(
        isinstance(word, str) for word in words
    ):
      raise UserError(f"words must be a list of words, got {words!r:.60}.")
    return Words(tuple(words))
  if library_form.is_bytes(fields):
    return Bytes()
  words = library_form.words_of(fields)
  return Bpe(content) if words is None else Words(tuple(words))


def save(
    tokenizer: Tokenizer, folder: pathlib.Path, max_len: int | None = None
) -> None:
  """Writes tokenizer.json and tokenizer_config.json, for transformers too.

  Args:
    tokenizer: Of any kind.
    folder: Which is there.
    max_len: Longest text of the model, in tokens; None where any fits.
  """
  content = tokenizer.to_json()
  if isinstance(tokenizer, Bytes):
    content = json.dumps(library_form.of_bytes())
  if isinstance(tokenizer, Words):
    described = library_form.of_words(tokenizer.words)
    content = json.dumps(described, ensure_ascii=False)
  workdir.write_atomic(folder / _FILE, content)
  workdir.write_atomic(folder / _SETTINGS, library_form.settings(max_len))


def is_in(folder: pathlib.Path) -> bool:
  """Whether a folder has a tokenizer.json."""
  return (folder / _FILE).is_file()


def from_folder(folder: str | pathlib.Path) -> Tokenizer:
  """Reads the tokenizer.json of a folder: `save`'s, or Hugging Face's.

  Raises:
    UserError: There is none, or it cannot be read.
  """
  local = hub.existing(folder)
  path = local / _FILE
  if not path.exists():
    raise UserError(
        f"{path} does not exist; the folder holds {hub.contents(local)}. A fast"
        " tokenizer of `transformers` writes it with save_pretrained."
    )
  try:
    return from_json(json_file.read_text(path))
  except UserError as error:
    named = str(error) if str(path) in str(error) else f"{path}: {error}"
    raise UserError(named) from error


def _checked(ids: Ids, vocab_size: int) -> Int[np.ndarray, "T"]:
  """Returns ids as an array, or says which one has no meaning."""
  array = np.asarray(ids, np.int64)
  wrong = array[(array < 0) | (array >= vocab_size)]
  if len(wrong):
    raise UserError(f"Ids must lie in [0, {vocab_size}), got {wrong[0]}.")
  return array


def check_text(text: str) -> None:
  """Raises UserError if a text has lone surrogates, which no encoding has.

  Python puts them where bytes of the command line were no UTF-8.
  """
  try:
    text.encode()
  except UnicodeEncodeError as error:
    place = text[max(error.start - 20, 0) : error.end + 20]
    raise UserError(
        f"The text {place!r} holds bytes that are no UTF-8, or lone surrogates:"
        " give it in UTF-8."
    ) from error


def _tokenizers() -> Any:
  try:
    # Imported here: an extra that byte and word models do without.
    return importlib.import_module("tokenizers")
  except ImportError as error:
    raise UserError(
        "BPE needs the tokenizers library: pip install 'scansnap-jax[hf]'"
    ) from error
