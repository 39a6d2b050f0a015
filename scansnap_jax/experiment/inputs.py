"""What a run reads: the sha256 of every file, in the workdir's inputs.json.

Settings say where a text lies, not what it says. A run that is resumed on
another text would end as a mixture of two, so that it is refused.
"""

from collections.abc import Mapping
import hashlib
import json
import pathlib

from scansnap_jax.experiment import errors
from scansnap_jax.experiment import json_file
from scansnap_jax.experiment import workdir as workdir_lib
from scansnap_jax.experiment.processes import devices

_NAME = "inputs.json"
_CHUNK = 2**20


def record(workdir: pathlib.Path, digests: Mapping[str, str]) -> None:
  """Records what a run reads, or holds it against what it began with.

  All processes of a run call it; the main one alone writes.

  Args:
    workdir: A claimed folder.
    digests: The sha256, in hex, of each input, by where it came from.

  Raises:
    UserError: An input has other content than when the run began, or is another
      one.
  """
  path = workdir / _NAME
  with devices.main_process_first():
    if devices.is_main_process():
      if path.exists():
        _compare(path, json_file.read_object(path), digests)
      else:
        text = json.dumps(dict(digests), indent=2)
        workdir_lib.write_atomic(path, text + "\n")


def named_sha256(path: str) -> str:
  """A file's name as a user gave it, and its sha256, for settings that differ.

  Raises:
    UserError: As `sha256`, or its home is nobody's.
  """
  return f"{path}, sha256 {sha256(json_file.local_path(path))}"


def sha256(path: pathlib.Path) -> str:
  """The sha256 of a regular file, in hex.

  Raises:
    UserError: There is none, or it may not be read.
  """
  json_file.check_regular(path)
  digest = hashlib.sha256()
  try:
    with path.open("rb") as file:
      while chunk := file.read(_CHUNK):
        digest.update(chunk)
  except OSError as error:
    raise errors.UserError(f"{path}: {error.strerror}.") from error
  return digest.hexdigest()


def _compare(
    path: pathlib.Path, then: Mapping[str, object], now: Mapping[str, str]
) -> None:
  """Raises UserError at the first input that is not what it was.

  Files may have moved: what they hold is compared, in order.
  """
  if [*then.values()] == [*now.values()]:
    return
  for name in {**then, **now}:
    was, found = then.get(name), now.get(name)
    if was != found:
      raise errors.UserError(
          f"{name} is not what the run in {path.parent} began with:"
          f" {_show(was)} then, {_show(found)} now. Put it back to resume that"
          " run, or give another --workdir."
      )
  raise errors.UserError(
      f"the inputs of the run in {path.parent} are in another order: {[*then]}"
      f" then, {[*now]} now. Give another --workdir."
  )


def _show(digest: object) -> str:
  return "not read" if digest is None else f"sha256 {str(digest)[:12]}"
