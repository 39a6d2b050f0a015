"""Where the text of a corpus comes from, and nothing is taken for another.

`find` knows the embedded `tinyshakespeare`, WikiText-2 and -103 by name, and
any file or folder of plain text by its path. It looks for WikiText in a folder,
then asks Hugging Face, and else says which files it looked for.
"""

from collections.abc import Iterator, Mapping, Sequence
import gzip
import hashlib
import importlib
import importlib.resources
import math
import os
import pathlib
import types
from typing import NamedTuple

from absl import logging

from scansnap_jax.experiment import json_file
from scansnap_jax.experiment import require
from scansnap_jax.experiment.errors import UserError

SPLITS = ("train", "valid", "test")
EMBEDDED = "tinyshakespeare"

# Name to the configuration of Hugging Face's `wikitext`.
WIKITEXT: Mapping[str, str] = types.MappingProxyType({
    "wikitext2": "wikitext-2-v1",
    "wikitext2-raw": "wikitext-2-raw-v1",
    "wikitext103": "wikitext-103-v1",
    "wikitext103-raw": "wikitext-103-raw-v1",
})

_HUB = "Salesforce/wikitext"
# File names of the splits, as they have been published.
_PATTERNS = ("{}.txt", "wiki.{}.tokens", "wiki.{}.raw")
_TEXT_SUFFIXES = (".txt", ".tokens", ".raw", ".md")
# sha256 of train, valid and test as published.
_PUBLISHED: Mapping[str, tuple[str, ...]] = types.MappingProxyType({
    "wikitext2": (
        "9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f",
        "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
        "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
    )
})
# Texts are decoded in blocks of whole lines of about this many bytes.
_BLOCK = 2**24


class Text(NamedTuple):
  """The text of a corpus.

  Attributes:
    name: The corpus, or the path that was asked for.
    splits: UTF-8 of train, valid and test; the last may be empty.
    files: sha256 of every file, by where it came from.
    fractions: Shares of the splits where one text was cut; otherwise None.
    is_published: Whether the files are the published ones, byte for byte; None
      where nothing is known of them.
  """

  name: str
  splits: Mapping[str, bytes]
  files: Mapping[str, str]
  fractions: tuple[float, ...] | None = None
  is_published: bool | None = None


def find(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    fractions: Sequence[float] = (0.9, 0.05, 0.05),
) -> Text:
  """Finds a corpus.

  Args:
    name: `tinyshakespeare`, `wikitext2`, `wikitext103` (with `-raw` for the
      text before rare words became <unk>), or the path of a text file or of a
      folder, which may lie in `data_dir`. A folder of train and valid (and
      test) files keeps these splits; other texts are cut.
    data_dir: Where WikiText is looked for.
    fractions: Shares of train, valid and test of a text without splits. Cuts
      are made at line ends.

  Returns:
    The text.

  Raises:
    UserError: It is not to be found, or not UTF-8, or `fractions` are no
      shares.
  """
  _check_fractions(fractions)
  known = _known_name(name)
  if known == EMBEDDED:
    packed = (
        importlib.resources.files("joma.transformer")
        / "data"
        / f"{known}.txt.gz"
    )
    text = gzip.decompress(packed.read_bytes())
    return _cut(known, {f"{known} (embedded)": text}, fractions)
  if known is not None:
    return _find_wikitext(known, data_dir)
  return _find_path(name, data_dir, fractions)


def blocks(data: bytes) -> Iterator[str]:
  """Yields a text in blocks of whole lines, small enough to work on.

  Raises:
    UserError: It is not UTF-8.
  """
  start = 0
  while start < len(data):
    end = len(data)
    if end - start > _BLOCK:
      end = data.find(b"\n", start + _BLOCK) + 1 or end
    try:
      yield data[start:end].decode()
    except UnicodeDecodeError as error:
      raise UserError(
          f"Text must be UTF-8; it is not at byte {start + error.start}."
      ) from error
    start = end


def _known_name(name: str) -> str | None:
  """The corpus that a name means, however it is spelt."""
  plain = lambda text: text.lower().replace("-", "").replace("_", "")
  spelt = plain(name)
  for known in (EMBEDDED, *WIKITEXT):
    if spelt in (plain(known), plain(known) + "v1"):
      return known
  return None


def _find_wikitext(known: str, data_dir: str | os.PathLike[str] | None) -> Text:
  size = known.removesuffix("-raw").removeprefix("wikitext")
  is_raw = known.endswith("-raw")
  if is_raw:
    names = (f"wikitext-{size}-raw", f"wikitext{size}-raw", WIKITEXT[known])
    patterns = ("wiki.{}.raw", "{}.txt")
  else:
    names = (f"wikitext-{size}", f"wikitext{size}", WIKITEXT[known])
    patterns = ("{}.txt", "wiki.{}.tokens")
  folders = []
  if data_dir is not None:
    root = json_file.local_path(data_dir)
    folders = [root / folder for folder in names]
    # The folder itself may be the corpus, unless its name says another one.
    if _known_name(root.resolve().name) in (None, known):
      folders.append(root)
  for folder in folders:
    for pattern in patterns:
      paths = {split: folder / pattern.format(split) for split in SPLITS}
      if all(path.is_file() for path in paths.values()):
        return _published(_read_splits(known, paths))
  try:
    return _published(_from_hub(known))
  except Exception as error:  # Of no common class: network, hub, arrow.
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    wanted = " or ".join(
        ", ".join(pattern.format(split) for split in SPLITS)
        for pattern in patterns
    )
    searched = ", ".join(map(str, folders)) or "no folder: give --data_dir"
    raise UserError(
        f"--corpus={known} is not there. Looked for {wanted} in {searched}."
        f" Hugging Face's {_HUB} did not help either ({reason})."
    ) from error


def _from_hub(known: str) -> Text:
  datasets = importlib.import_module("datasets")
  splits, files = {}, {}
  for split, hub_split in zip(
      SPLITS, ("train", "validation", "test"), strict=True
  ):
    rows = datasets.load_dataset(_HUB, WIKITEXT[known], split=hub_split)
    # Lines come with their ends, but empty where the file has " \n".
    text = "".join(line or " \n" for line in rows["text"])
    splits[split] = text.encode()
    origin = f"{_HUB}/{WIKITEXT[known]}/{hub_split}"
    files[origin] = hashlib.sha256(splits[split]).hexdigest()
  return Text(known, splits, files)


def _published(text: Text) -> Text:
  """Says whether a corpus of this name is what was published under it."""
  expected = _PUBLISHED.get(text.name)
  if expected is None:
    return text
  is_published = tuple(text.files.values()) == expected
  if not is_published:
    logging.warning(
        "%s: the files differ from the published ones: %s",
        text.name,
        ", ".join(text.files),
    )
  return text._replace(is_published=is_published)


def _find_path(
    name: str,
    data_dir: str | os.PathLike[str] | None,
    fractions: Sequence[float],
) -> Text:
  places = [json_file.local_path(name)]
  if data_dir is not None:
    places.append(json_file.local_path(data_dir) / name)
  for path in places:
    if path.is_file():
      return _cut(name, {str(path): _read(path)}, fractions)
    if path.is_dir():
      return _read_folder(name, path, fractions)
  raise UserError(
      f"--corpus={name} is none of {', '.join((EMBEDDED, *WIKITEXT))}, and no"
      f" file or folder: looked for {' and '.join(map(str, places))}."
  )


def _read_folder(
    name: str, folder: pathlib.Path, fractions: Sequence[float]
) -> Text:
  for pattern in _PATTERNS:
    paths = {split: folder / pattern.format(split) for split in SPLITS}
    found = {split: path for split, path in paths.items() if path.is_file()}
    if {"train", "valid"} <= set(found):
      return _read_splits(name, found)
    if len(found) > 1:  # To cut train and test anew would mix them.
      raise UserError(
          f"{folder} holds {', '.join(path.name for path in found.values())}"
          f" and lacks {pattern.format('train')} or {pattern.format('valid')}."
      )
  paths = sorted(
      path
      for path in folder.rglob("*")
      if path.is_file() and path.suffix in _TEXT_SUFFIXES
  )
  if not paths:
    raise UserError(
        f"{folder} holds no text: no"
        f" {' '.join('*' + s for s in _TEXT_SUFFIXES)}."
    )
  return _cut(name, {str(path): _read(path) for path in paths}, fractions)


def _read_splits(name: str, paths: Mapping[str, pathlib.Path]) -> Text:
  splits = {
      split: _read(paths[split]) if split in paths else b"" for split in SPLITS
  }
  files = {
      str(path): hashlib.sha256(splits[split]).hexdigest()
      for split, path in paths.items()
  }
  return Text(name, splits, files)


def _cut(
    name: str, texts: Mapping[str, bytes], fractions: Sequence[float]
) -> Text:
  """Cuts texts, put together, at the line ends next to the shares."""
  files = {
      path: hashlib.sha256(text).hexdigest() for path, text in texts.items()
  }
  parts = [t if t.endswith(b"\n") else t + b"\n" for t in texts.values()]
  data = b"".join(parts) if len(parts) > 1 else next(iter(texts.values()))
  first = round(fractions[0] * len(data))
  second = round((fractions[0] + fractions[1]) * len(data))
  first = _line_start(data, first, second)
  second = _line_start(data, max(first, second), len(data))
  splits = (data[:first], data[first:second], data[second:])
  return Text(
      name, dict(zip(SPLITS, splits, strict=True)), files, tuple(fractions)
  )


def _line_start(data: bytes, position: int, limit: int) -> int:
  """The next start of a line before `limit`, or else of a character."""
  line = data.find(b"\n", max(position - 1, 0), limit) + 1
  if line:
    return line
  while position < len(data) and data[position] & 0xC0 == 0x80:
    position += 1
  return position


def _check_fractions(fractions: Sequence[float]) -> None:
  is_share = all(0 <= fraction <= 1 for fraction in fractions)
  if len(fractions) != 3 or not is_share or not math.isclose(sum(fractions), 1):
    raise UserError(
        "fractions must be three shares of 1, of train, valid and test, got"
        f" {tuple(fractions)}."
    )


def _read(path: pathlib.Path) -> bytes:
  try:
    # The text, its splits and ids of two or four bytes.
    require.memory(f"the text {path}", 6 * path.stat().st_size)
    data = path.read_bytes()
  except OSError as error:
    raise UserError(f"{path} cannot be read: {error.strerror}.") from error
  if not data:
    raise UserError(f"{path} is empty.")
  return data
