"""A corpus as arrays of token ids, and what a run says of it.

`load` finds the text, makes or takes the tokenizer, and encodes each split
once: with a folder for it the ids lie there as .npy files, which later loads
map into memory. Batches of them are in `batches`.
"""

from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import functools
import hashlib
import io
import os
import pathlib
from typing import Any, NamedTuple
import zlib

from jaxtyping import Integer
import numpy as np

from joma.transformer.hf import hub
from joma.transformer.text import corpus_text
from joma.transformer.text import tokenizer as tokenizer_lib
from scansnap_jax.experiment import json_file
from scansnap_jax.experiment import workdir
from scansnap_jax.experiment.errors import UserError

_CHUNK = 2**20
_LEARNED = ("words", "bpe")


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Token ids of the splits, uint16 where the vocabulary allows, or int32.

  Attributes:
    text: Where they are from; without the text itself.
    tokenizer: What made them.
    train: Ids, in the order of the text.
    valid: Ids.
    test: Ids; empty where the corpus has no such split.
  """

  text: corpus_text.Text
  tokenizer: tokenizer_lib.Tokenizer
  train: Integer[np.ndarray, "_"]
  valid: Integer[np.ndarray, "_"]
  test: Integer[np.ndarray, "_"]

  @property
  def vocab_size(self) -> int:
    """V."""
    return self.tokenizer.vocab_size

  def facts(self) -> dict[str, Any]:
    """Returns what a run records of its corpus, in plain JSON types."""
    fractions = self.text.fractions
    return {
        "corpus": self.text.name,
        "files": dict(self.text.files),
        "fractions": fractions and list(fractions),
        "is_published": self.text.is_published,
        "tokenizer": self.tokenizer.name,
        "tokenizer_sha256": _sha256(self.tokenizer.to_json().encode()),
        "vocab_size": self.vocab_size,
        "num_tokens": {
            split: len(getattr(self, split)) for split in corpus_text.SPLITS
        },
    }


class Learned(NamedTuple):
  """A tokenizer, and what it was learned of.

  Attributes:
    key: Kind, most tokens and sha256 of the text; empty where nothing was
      learned.
    tokenizer: The tokenizer.
  """

  key: tuple[str, ...]
  tokenizer: tokenizer_lib.Tokenizer


def learn(
    name: str = corpus_text.EMBEDDED,
    *,
    tokenizer: str = "bytes",
    data_dir: str | os.PathLike[str] | None = None,
    bpe_vocab_size: int = 8192,
) -> Learned:
  """Makes the tokenizer that `load` would, and encodes nothing.

  Arguments and errors are those of `load`.
  """
  if tokenizer not in _LEARNED:
    return Learned((), _make_tokenizer(tokenizer, b"", bpe_vocab_size, None))
  train = corpus_text.find(name, data_dir=data_dir).splits["train"]
  made = _make_tokenizer(tokenizer, train, bpe_vocab_size, None)
  return Learned(_key(tokenizer, train, bpe_vocab_size), made)


def load(
    name: str = corpus_text.EMBEDDED,
    *,
    tokenizer: str | tokenizer_lib.Tokenizer = "bytes",
    data_dir: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    bpe_vocab_size: int = 8192,
    fractions: Sequence[float] = (0.9, 0.05, 0.05),
    learned: Learned | None = None,
) -> Corpus:
  """Loads a corpus.

  Args:
    name: Which; see `corpus_text.find`.
    tokenizer: `bytes`; `words` or `bpe`, learned of the train split alone; the
      path of a folder with a tokenizer.json, or its name on Hugging Face; or a
      tokenizer.
    data_dir: Where WikiText, or a relative `name`, is looked for.
    cache_dir: Folder for the ids and for what was learned; None keeps both in
      memory. Files there are named by their content: several corpora may share
      it, and a text that changed is encoded anew.
    bpe_vocab_size: V at most of a tokenizer `bpe`.
    fractions: Shares of train, valid and test of a text without splits.
    learned: What `learn` gave; of the same text it is not learned again.

  Returns:
    The corpus.

  Raises:
    UserError: Text or tokenizer cannot be had, or are not what they should be.
  """
  text = corpus_text.find(name, data_dir=data_dir, fractions=fractions)
  cache = None if cache_dir is None else json_file.local_path(cache_dir)
  if cache is not None:
    workdir.make_folder(cache)
  if isinstance(tokenizer, str):
    tokenizer = _make_tokenizer(
        tokenizer, text.splits["train"], bpe_vocab_size, cache, learned
    )
  described = tokenizer.to_json().encode()
  ids = {}
  for split, data in text.splits.items():
    make = functools.partial(_encode, tokenizer, data)
    path = None
    if cache is not None:
      key = _sha256(_sha256(data).encode() + described)
      path = cache / f"{split}-{key[:16]}.npy"
    ids[split] = _cached(path, make)
  return Corpus(text._replace(splits={}), tokenizer, **ids)


def _make_tokenizer(
    kind: str,
    train: bytes,
    bpe_vocab_size: int,
    cache: pathlib.Path | None,
    learned: Learned | None = None,
) -> tokenizer_lib.Tokenizer:
  if kind == "bytes":
    return tokenizer_lib.Bytes()
  if kind not in tokenizer_lib.KINDS:
    if not hub.folder(kind).is_dir():
      raise UserError(
          f"tokenizer={kind} is none of {', '.join(tokenizer_lib.KINDS)}, and"
          " no folder with a tokenizer.json."
      )
    return tokenizer_lib.from_folder(kind)
  lines = corpus_text.blocks(train)
  key = _key(kind, train, bpe_vocab_size)
  if learned is not None and learned.key == key:
    make = lambda: learned.tokenizer
  elif kind == "words":
    make = lambda: tokenizer_lib.learn_words(lines)
  else:
    make = lambda: tokenizer_lib.learn_bpe(lines, bpe_vocab_size)
  if cache is None:
    return make()
  path = cache / f"{'-'.join((*key[:-1], key[-1][:16]))}.json"
  _make_whole(path, lambda: make().to_json().encode())
  return tokenizer_lib.from_json(path.read_text(encoding="utf-8"))


def _key(kind: str, train: bytes, bpe_vocab_size: int) -> tuple[str, ...]:
  """What a tokenizer that is learned depends on."""
  size = (str(bpe_vocab_size),) if kind == "bpe" else ()
  return (kind, *size, _sha256(train))


def _encode(
    tokenizer: tokenizer_lib.Tokenizer, data: bytes
) -> Integer[np.ndarray, "_"]:
  """Encodes a text; one of more than 16 MiB block by block, at line ends."""
  dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
  parts = [
      tokenizer.encode(block).astype(dtype)
      for block in corpus_text.blocks(data)
  ]
  return np.concatenate(parts) if parts else np.zeros(0, dtype)


def _cached(
    path: pathlib.Path | None, make: Callable[[], Integer[np.ndarray, "_"]]
) -> Integer[np.ndarray, "_"]:
  """Maps the array of a file, which it writes first where it is not whole."""
  if path is None:
    return make()

  def to_npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, make(), allow_pickle=False)
    return buffer.getvalue()

  _make_whole(path, to_npy)
  return np.load(path, mmap_mode="r", allow_pickle=False)


def _make_whole(path: pathlib.Path, make: Callable[[], bytes]) -> None:
  """Writes a file anew unless every bit of it is as it was written.

  numpy maps whatever bytes it finds, and a run would train on them.
  """
  checksum = path.with_name(f"{path.name}.crc32")
  with contextlib.suppress(OSError):  # What cannot be read is made again.
    if path.is_file() and checksum.is_file():
      crc = 0
      with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
          crc = zlib.crc32(chunk, crc)
      if checksum.read_bytes().strip() == str(crc).encode():
        return
  data = make()
  workdir.write_atomic(checksum, f"{zlib.crc32(data)}\n")
  workdir.write_atomic(path, data)


def _sha256(data: bytes) -> str:
  return hashlib.sha256(data).hexdigest()
