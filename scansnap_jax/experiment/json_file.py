"""JSON files that others wrote: read with bounds, refused in one sentence."""

from collections.abc import Mapping
import json
import os
import pathlib
import stat
from typing import Any

from scansnap_jax.experiment import errors

# No config.json or tokenizer.json known comes near; a text or a model does.
_MOST_BYTES = 256 * 2**20
_MOST_DIGITS = 300


def read_object(
    path: str | os.PathLike[str], *, most_bytes: int = _MOST_BYTES
) -> dict[str, Any]:
  """Returns the JSON object that a file holds.

  Args:
    path: Of a regular file, which may be reached by links.
    most_bytes: Largest size, in bytes, that is read at all.

  Raises:
    UserError: If there is no such file, it is no regular file, may not be read,
      is larger than `most_bytes`, is not UTF-8 or not JSON, is nested too
      deeply, or holds something else than an object.
  """
  path = pathlib.Path(path)
  return parse_object(read_text(path, most_bytes=most_bytes), path)


def parse_object(text: str, source: object) -> dict[str, Any]:
  """Returns the JSON object that a text is; errors name `source`.

  Raises:
    UserError: As `read_object`.
  """
  try:
    value = json.loads(text, parse_int=_parse_int)
  except RecursionError as error:
    raise errors.UserError(f"{source} is nested too deeply to be read.") from (
        error
    )
  except ValueError as error:  # No JSON, or an integer of too many digits.
    raise errors.UserError(f"{source} is not JSON: {error}") from error
  if not isinstance(value, dict):
    raise errors.UserError(
        f"{source} must hold a JSON object {{...}}, got {type(value).__name__}."
    )
  return value


def _parse_int(digits: str) -> int:
  """Refuses whole numbers that no float can hold: they are no setting."""
  if len(digits) > _MOST_DIGITS:
    raise ValueError(f"it has a whole number of {len(digits)} digits")
  return int(digits)


def read_text(path: pathlib.Path, *, most_bytes: int = _MOST_BYTES) -> str:
  """Returns the text of a regular UTF-8 file, its line ends as they are.

  A byte order mark at its beginning is no text.

  Raises:
    UserError: As `read_object`, JSON aside.
  """
  check_regular(path)
  try:
    size = path.stat().st_size
    if size > most_bytes:
      raise errors.UserError(
          f"{path} has {size} bytes; at most {most_bytes} are read."
      )
    return path.read_bytes().decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise errors.UserError(f"{path} is not UTF-8: {error}") from error
  except OSError as error:
    raise errors.UserError(f"{path}: {error.strerror}.") from error


def read_lines(path: pathlib.Path, flag: str) -> list[str]:
  """Reads a text file whose every line is a text of its own.

  A line ends at LF or CR LF alone: form feeds and U+2028 are text.

  Args:
    path: UTF-8, with a byte order mark or none.
    flag: That named the file, for errors.

  Raises:
    UserError: As `read_text`.
  """
  try:
    lines = read_text(path).removesuffix("\n").split("\n")
  except errors.UserError as error:
    raise errors.UserError(f"--{flag}: {error}") from error
  return [line.removesuffix("\r") for line in lines]


def append_object(path: pathlib.Path, value: Mapping[str, Any]) -> None:
  """Adds a line with a JSON object to a file; it is on the disk then.

  Raises:
    UserError: The file cannot be written.
  """
  try:
    # A line that a kill cut short is ended first: it would spoil the next one.
    is_cut = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    with open(path, "a", encoding="utf-8") as file:
      file.write("\n" * is_cut + json.dumps(value) + "\n")
      file.flush()
      os.fsync(file.fileno())
  except OSError as error:
    raise errors.UserError(
        f"{path} cannot be written: {error.strerror}."
    ) from error


def read_objects(path: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the objects of a file of one a line; none where there is no file.

  Lines that are no object are left out: a kill may have cut one short.
  """
  if not path.exists():
    return []
  found = []
  for line in read_text(path).splitlines():
    try:
      found.append(parse_object(line, path))
    except errors.UserError:
      continue
  return found


def local_path(name: str | os.PathLike[str]) -> pathlib.Path:
  """The path that a user's text means: `~` is the home folder.

  `~nobody/x`, of whom there is none here, is a name like any other.
  """
  return pathlib.Path(os.path.expanduser(name))


def split_paths(text: str) -> list[str]:
  """Cuts a list of paths at its commas, but never a path that is there.

  Of two ways to read `a,b` the longer path counts. Spaces around a path go,
  unless it has them itself.
  """
  parts, found = text.split(","), []
  while parts:
    starts = [",".join(parts[:end]) for end in range(len(parts), 0, -1)]
    names = (name for start in starts for name in (start, start.strip()))
    there = (name for name in names if os.path.exists(local_path(name)))
    found.append(next(there, parts[0].strip()))
    parts = parts[1 + found[-1].count(",") :]
  return found


def check_regular(path: pathlib.Path) -> None:
  """Raises UserError unless a path leads to a regular file.

  Reading a FIFO or a device would wait for ever.
  """
  try:
    mode = path.stat().st_mode
  except (OSError, ValueError) as error:  # ValueError: a null character.
    reason = error.strerror if isinstance(error, OSError) else str(error)
    raise errors.UserError(f"{path} cannot be read: {reason}.") from error
  if not stat.S_ISREG(mode):
    kind = "a folder" if stat.S_ISDIR(mode) else "no regular file"
    raise errors.UserError(f"{path} is {kind}; a file is wanted.")
