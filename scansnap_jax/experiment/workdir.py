"""The folder of one run: whose it is, and with which settings.

A run writes `config.json` and `flags.txt` into its workdir before anything
else. The same command finds them again and continues; another config is told
what differs and touches nothing.
"""

from collections.abc import Collection, Iterator, Mapping
import contextlib
import dataclasses
import enum
import fcntl
import json
import math
import os
import pathlib
from typing import Any

from scansnap_jax.experiment import errors
from scansnap_jax.experiment import json_file

_CONFIG = "config.json"
_FLAGS = "flags.txt"
_LOCK = ".lock"
# Of a config: variables of the environment that decide numbers, where set.
ENVIRONMENT = "environment"
_ABSENT = object()


def claim(
    workdir: str | os.PathLike[str],
    config: Mapping[str, Any],
    flagfile_text: str,
    may_differ: Collection[str] = (),
) -> pathlib.Path:
  """Makes `workdir` the folder of the run with this config, or finds it so.

  Of several processes one should call it.

  Args:
    workdir: A local folder, created with its parents if need be.
    config: The settings, as `config_to_json` gives them.
    flagfile_text: Becomes `flags.txt`, with which the run can be repeated.
    may_differ: Settings, by their dotted names, in which a run that goes on
      may differ from the one that began.

  Returns:
    The absolute path of the folder, which holds `config.json` and `flags.txt`.

  Raises:
    UserError: The path is no writable folder, or the folder belongs to a run
      with another config, or holds files of something else. Nothing in it was
      changed.
  """
  path = _writable_folder(workdir)
  if not _check_free(path, config, may_differ):
    text = json.dumps(config, indent=2, allow_nan=False)
    write_atomic(path / _CONFIG, text + "\n")
  if not (path / _FLAGS).exists():
    write_atomic(path / _FLAGS, flagfile_text)
  return path


@contextlib.contextmanager
def hold(
    workdir: str | os.PathLike[str],
    config: Mapping[str, Any],
    flagfile_text: str,
    may_differ: Collection[str] = (),
) -> Iterator[pathlib.Path]:
  """Claims a folder and keeps other runs out of it, in one step.

  A new folder is let go of again where a UserError ends the run before it has
  made anything: what was wrong can be mended under the same name.

  Arguments and errors are those of `claim` and `lock`.

  Yields:
    The absolute path of the folder.
  """
  path = _writable_folder(workdir)
  # A folder of something else gets no lock either.
  _check_free(path, config, may_differ)
  with lock(path):
    # Two runs may have come that far: what the lock's holder finds counts.
    is_new = not os.path.lexists(path / _CONFIG)
    claimed = claim(workdir, config, flagfile_text, may_differ)
    try:
      yield claimed
    except errors.UserError:
      if is_new:
        # The folder itself may have gone: the run's own error is what counts.
        with contextlib.suppress(OSError):
          _let_go(claimed)
      raise


def _let_go(path: pathlib.Path) -> None:
  """Removes a run's settings, unless there is anything else of it."""
  names = {each.name for each in path.iterdir() if not _is_left_over(each.name)}
  if names <= {_CONFIG, _FLAGS}:
    for name in names:
      (path / name).unlink()


def _check_free(
    path: pathlib.Path,
    config: Mapping[str, Any],
    may_differ: Collection[str],
) -> bool:
  """Whether the folder is that of this run already; it may be nobody's.

  Raises:
    UserError: It is another's.
  """
  if os.path.lexists(path / _CONFIG):
    # What reads back is compared with what was read: tuples are lists there.
    asked = json.loads(json.dumps(config, allow_nan=False))
    found = _read_config(path / _CONFIG)
    difference = describe_difference(found, asked, may_differ)
    if difference:
      more = f"; and {len(difference) - 6} more" if len(difference) > 6 else ""
      advice = "or the settings there to resume it"
      if any(
          line.endswith(f"{_show(_ABSENT)} here")
          for line in difference
          if not line.startswith(f"{ENVIRONMENT}.")
      ):
        # What does not exist here cannot be given.
        advice = "or resume it with the version that began it"
      raise errors.UserError(
          f"{path} holds a run with other settings:"
          f" {'; '.join(difference[:6])}{more}. Give another --workdir,"
          f" {advice}."
      )
    return True
  # A kill may have left a lock, or half a config; anything else is someone's.
  try:
    found = sorted(p.name for p in path.iterdir() if not _is_left_over(p.name))
  except OSError as error:
    raise errors.UserError(
        f"--workdir={path} cannot be read: {error.strerror}."
    ) from error
  if found:
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    raise errors.UserError(
        f"{path} holds {', '.join(found[:3])}{more} but no {_CONFIG}, so it"
        " is no run's folder. Give an empty or a new --workdir."
    )
  return False


@contextlib.contextmanager
def lock(workdir: pathlib.Path) -> Iterator[None]:
  """Keeps a second run out of a claimed folder; a killed run lets go of it.

  Raises:
    UserError: Another process holds it, or it is no file that may be written.
  """
  path = workdir / _LOCK
  if os.path.lexists(path):
    json_file.check_regular(path)
  try:
    opened = open(path, "a")
  except OSError as error:
    raise errors.UserError(
        f"{path} cannot be opened: {error.strerror}."
    ) from error
  with opened as file:
    try:
      # The system lets go of it when the process ends, however it ends: no
      # stale lock keeps a killed run from being continued.
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      raise errors.UserError(
          f"another run is at work in {workdir}. Wait for it, or give another"
          " --workdir."
      ) from error
    yield


def describe_difference(
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    may_differ: Collection[str] = (),
) -> list[str]:
  """Lists the settings in which `a` and `b` differ.

  What `a` lacks and `b` has as None is no difference: later versions add
  settings so, and a run that was begun without them goes on.

  Args:
    a: The settings found, possibly nested.
    b: The settings asked for.
    may_differ: Settings that are left out, by their dotted names.

  Returns:
    Lines such as `optimizer.lr_z: 0.5 there, 1.0 here`, in the order of `a`
    and then of `b`; empty if the two are equal.
  """
  there, here = dict(_flatten(a)), dict(_flatten(b))
  pairs = {
      name: (there.get(name, _ABSENT), here.get(name, _ABSENT))
      for name in there | here
  }
  return [
      f"{name}: {_show(found)} there, {_show(asked)} here"
      for name, (found, asked) in pairs.items()
      if name not in may_differ
      and not _is_same(found, asked)
      and not (found is _ABSENT and asked is None)
  ]


def config_to_json(config: object) -> Any:
  """Turns a config into plain JSON types.

  Args:
    config: A dataclass of numbers, strings, enums, tuples, mappings and
      dataclasses.

  Returns:
    Nested dicts and lists. Enums become their name in lower case, and floats
    that JSON lacks become text (`"inf"`).

  Raises:
    TypeError: A value is of another type.
  """
  if dataclasses.is_dataclass(config) and not isinstance(config, type):
    names = [field.name for field in dataclasses.fields(config)]
    return {name: config_to_json(getattr(config, name)) for name in names}
  if isinstance(config, Mapping):
    return {str(key): config_to_json(value) for key, value in config.items()}
  if isinstance(config, enum.Enum):
    return config.name.lower()
  if isinstance(config, (tuple, list)):
    return [config_to_json(value) for value in config]
  if isinstance(config, float) and not math.isfinite(config):
    return repr(config)
  if config is None or isinstance(config, (bool, int, float, str)):
    return config
  raise TypeError(f"no JSON for a {type(config).__name__}: {config!r}")


def write_atomic(path: str | os.PathLike[str], content: str | bytes) -> None:
  """Writes a whole file or, if interrupted, nothing. Text is UTF-8.

  Raises:
    UserError: It cannot be written: the disk is full, the folder is gone or
      read-only, or the path is that of a folder, a pipe or a device. What the
      file held before is still there.
  """
  path = pathlib.Path(path)
  if os.path.exists(path):
    # The new file would take its place: that of /dev/null too.
    json_file.check_regular(path)
  data = content.encode() if isinstance(content, str) else content
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    with open(temporary, "wb") as file:
      file.write(data)
      file.flush()
      # On disk before it gets its name, or a power cut could leave the name
      # with nothing behind it.
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except OSError as error:
    raise errors.UserError(
        f"{path} cannot be written: {error.strerror or error}."
    ) from error
  finally:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)


def make_folder(path: pathlib.Path) -> None:
  """Makes a folder, with its parents, where it is not there.

  Raises:
    UserError: It cannot be made.
  """
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise errors.UserError(
        f"{path} cannot be made a folder: {error.strerror}."
    ) from error


def check_can_be_made(path: pathlib.Path, name: str) -> None:
  """Raises UserError where no file could be, after its parents were made.

  Args:
    path: Of the file or folder.
    name: What the message calls it, as --out.
  """
  above = next(p for p in path.absolute().parents if os.path.lexists(p))
  if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
    raise errors.UserError(
        f"{name}={path} cannot be made: {above} is no folder that may be"
        " written to."
    )


def _writable_folder(workdir: str | os.PathLike[str]) -> pathlib.Path:
  if "://" in str(workdir) or not str(workdir):
    raise errors.UserError(f"--workdir={workdir} is no local folder")
  try:
    str(workdir).encode()
  except UnicodeEncodeError as error:
    # Reports, tables and checkpoints could not say it, hours later.
    raise errors.UserError(
        f"--workdir={str(workdir)!r} is no UTF-8; give a name that is."
    ) from error
  path = pathlib.Path(os.path.abspath(os.path.expanduser(workdir)))
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise errors.UserError(
        f"--workdir={workdir} cannot be made a folder: {error.strerror}"
    ) from error
  if not os.access(path, os.W_OK | os.X_OK):
    raise errors.UserError(f"--workdir={workdir} is not writable")
  return path


def _read_config(path: pathlib.Path) -> dict[str, Any]:
  try:
    return json_file.read_object(path)
  except errors.UserError as error:
    raise errors.UserError(
        f"{path} cannot be read ({error}). Give another --workdir; the run"
        f" there can be repeated with --flagfile={path.with_name(_FLAGS)}."
    ) from error


def _is_left_over(name: str) -> bool:
  """Whether a run was killed here before its folder was claimed."""
  ours = name.startswith((f".{_CONFIG}.", f".{_FLAGS}."))
  return name == _LOCK or (ours and name.endswith(".tmp"))


def _flatten(
    tree: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
  for name, value in tree.items():
    if isinstance(value, Mapping) and value:
      yield from _flatten(value, f"{prefix}{name}.")
    else:
      yield prefix + name, value


def _is_same(a: object, b: object) -> bool:
  # 1 and 1.0 are one setting, 1 and true are not.
  return a == b and isinstance(a, bool) == isinstance(b, bool)


def _show(value: object) -> str:
  return "absent" if value is _ABSENT else json.dumps(value, ensure_ascii=False)
