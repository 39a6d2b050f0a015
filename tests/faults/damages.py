"""Damages of a workdir and of what its run reads, drawn by a seed.

A damage is a function that changes a folder; it returns the paths that it
touched, one of which a refusal has to name.
"""

from collections.abc import Callable, Sequence
import io
import json
import os
import pathlib
import shutil

import numpy as np

Paths = Sequence[pathlib.Path]
_DEEP = "[" * 100_000 + "]" * 100_000


class Damager:
  """Draws damages of one folder with `inputs` and `run`."""

  def __init__(self, folder: pathlib.Path, seed: Sequence[int]):
    """Takes a folder, a copy that may be spoiled, and numbers for the seed."""
    self.folder = folder
    self.run = folder / "run"
    self._random = np.random.default_rng(seed)

  def draw(self, kind: str) -> Paths:
    """Does a damage of a kind."""
    return KINDS[kind](self)

  def _any(self, among: Sequence):
    return among[int(self._random.integers(len(among)))]

  def _files(self) -> list[pathlib.Path]:
    """Files of the run and of its inputs; those of checkpoints are most."""
    return sorted(p for p in self.folder.rglob("*") if p.is_file())

  def _top(self) -> list[pathlib.Path]:
    """Files that are not a checkpoint's."""
    return [p for p in self._files() if "checkpoints" not in p.parts]

  def _steps(self) -> list[pathlib.Path]:
    """Folders of checkpoints: the older before the newer."""
    found = self.run.glob("checkpoints/**/[0-9]")
    return sorted(p for p in found if (p / "digest").exists())

  def _file(self) -> pathlib.Path:
    """Half of the time none of a checkpoint's."""
    return self._any(
        self._top() if self._random.random() < 0.5 else self._files()
    )

  def flip(self) -> Paths:
    """Other bits in some bytes of a file."""
    path = self._file()
    data = bytearray(path.read_bytes() or b"\0")
    for _ in range(self._any((1, 1, 1, 5))):
      data[int(self._random.integers(len(data)))] ^= 1 << self._any(range(8))
    path.write_bytes(data)
    return [path]

  def cut(self) -> Paths:
    """A file ends too early."""
    path = self._file()
    data = path.read_bytes()
    path.write_bytes(data[: int(self._random.integers(len(data) + 1))])
    return [path]

  def zero(self) -> Paths:
    """A file of zeros, as some disks leave after a power cut."""
    path = self._file()
    path.write_bytes(bytes(path.stat().st_size))
    return [path]

  def append(self) -> Paths:
    """More at the end of a file."""
    path = self._file()
    path.write_bytes(path.read_bytes() + self._random.bytes(17))
    return [path]

  def remove(self) -> Paths:
    """A file or a folder is gone."""
    path = self._any([*self._top(), *self._folders(), self._any(self._files())])
    _remove(path)
    return [path]

  def _folders(self) -> list[pathlib.Path]:
    return sorted(
        p for p in self.run.rglob("*") if p.is_dir() and not p.is_symlink()
    )

  def swap(self) -> Paths:
    """Two files have each other's content."""
    one, other = self._file(), self._file()
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)
    return [one, other]

  def other_kind(self) -> Paths:
    """A folder, a pipe or a link that leads nowhere in place of a file."""
    path = self._any([*self._top(), *self._steps(), self.run / ".lock"])
    _remove(path)
    make = self._any((
        lambda: path.mkdir(),
        lambda: os.mkfifo(path),
        lambda: path.symlink_to("nowhere"),
        lambda: path.symlink_to(path.name),
        lambda: path.symlink_to("."),
    ))
    make()
    return [path]

  def file_for_folder(self) -> Paths:
    """A file in place of a folder."""
    path = self._any(self._folders())
    _remove(path)
    path.write_text("a file")
    return [path]

  def other_step(self) -> Paths:
    """A step under another's name: copied, linked, moved, or behind the end."""
    steps = self._steps()
    source = self._any(steps)
    names = ("2", "4", "6", "8", "5", "100000", "007")
    target = source.with_name(self._any([n for n in names if n != source.name]))
    if target.exists():
      shutil.rmtree(target)
    how = self._any(("copy", "link", "move"))
    if how == "copy":
      shutil.copytree(source, target)
    elif how == "link":
      target.symlink_to(source.name, target_is_directory=True)
    else:
      source.rename(target)
    return [target, source]

  def mixed_steps(self) -> Paths:
    """Part of one step in another."""
    steps = self._steps()
    if len(steps) < 2:
      return self.flip()
    source, target = steps[:2] if self._any((0, 1)) else steps[1::-1]
    inside = self._any(sorted(p for p in source.rglob("*")))
    place = target / inside.relative_to(source)
    _remove(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    if inside.is_dir():
      shutil.copytree(inside, place)
    else:
      shutil.copy(inside, place)
    return [place]

  def odd_name(self) -> Paths:
    """Something with an odd name among the steps."""
    steps = self._steps()
    names = ("-4", "4 (copy)", "four", "9" * 30, ".4", "4.tmp", "４", "0004")
    names += ("4.orbax-checkpoint-tmp-7", "4.corrupt", "\udcff", "4\n", "nan")
    path = steps[-1].with_name(self._any(names))
    if self._any((0, 1)):
      shutil.copytree(steps[-1], path, dirs_exist_ok=True)
    else:
      path.write_text("")
    return [path]

  def rows(self) -> Paths:
    """Rows of metrics.jsonl: lost, doubled, of huge steps, of other kinds."""
    path = self.run / "metrics.jsonl"
    rows = path.read_text().splitlines()
    at = int(self._random.integers(len(rows)))
    change = self._any((
        lambda: rows.pop(at),
        lambda: rows.insert(at, rows[at]),
        lambda: rows.insert(at, '{"step": 1000000000000000000000}'),
        lambda: rows.insert(at, '{"step": -1}'),
        lambda: rows.insert(at, '{"step": null, "tokens_per_sec": "x"}'),
        lambda: rows.insert(at, '{"step": NaN}'),
        lambda: rows.insert(at, "[]"),
        lambda: rows.insert(at, "no JSON"),
        lambda: rows.insert(at, _DEEP),
        lambda: rows.insert(at, ""),
        lambda: rows.reverse(),
        lambda: rows.clear(),
    ))
    change()
    path.write_text("\n".join(rows) + "\n")
    return [path]

  def json(self) -> Paths:
    """A JSON file is of another form."""
    path = self._any([
        p for p in self._files() if p.suffix == ".json" or p.name == "metadata"
    ])
    path.write_text(
        self._any((
            *("null", "[]", "{}", "7", '""', _DEEP, "{", "", "\ufeff{}"),
            *('{"step": ' + "9" * 5000 + "}", '{"body": {}, "crc32": 0}'),
            '{"a": NaN}',
        ))
    )
    return [path]

  def setting(self) -> Paths:
    """A setting that was recorded is another, or gone."""
    names = ("config.json", "inputs.json")
    paths = [self.run / name for name in names if (self.run / name).exists()]
    path = self._any(paths)
    value = json.loads(path.read_text())
    inner = value
    while True:
      key = self._any(sorted(inner))
      if not isinstance(inner[key], dict) or not inner[key]:
        break
      inner = inner[key]
    if self._any((0, 1)):
      inner[key] = self._any((None, 7, "x", [], {}, True, 1e308))
    else:
      del inner[key]
    path.write_text(json.dumps(value))
    # What is wrong may be said of the folder, or of the setting by its name.
    return [path, pathlib.Path(str(key)), self.run]

  def inputs(self) -> Paths:
    """What the run reads has other content, of the same kind."""
    inputs = self.folder / "inputs"
    path = self._any(sorted(p for p in inputs.rglob("*") if p.is_file()))
    data = path.read_bytes()
    path.write_bytes(
        self._any((
            data.replace(b"question", b"Question"),
            data[: len(data) // 2],
            data + b"and more",
            data + b"\n",
            b"",
            data[::-1],
            data.replace(b"be", b"\xff\xfe"),
        ))
    )
    return [path, inputs]

  def cached(self) -> Paths:
    """What is made once of a text and kept, with or without its checksum."""
    cached = sorted(self.run.glob("corpus/*"))
    if not cached:
      return self.inputs()
    path = self._any(cached)
    change = self._any((
        lambda: path.write_bytes(path.read_bytes()[::-1]),
        lambda: path.write_bytes(_npy(np.zeros(3, np.int64))),
        lambda: path.write_bytes(_npy(np.zeros((3, 3), np.uint16))),
        lambda: path.write_text("0\n"),
        lambda: path.unlink(),
        lambda: shutil.copy(self._any(cached), path),
        lambda: shutil.rmtree(path.parent),
    ))
    try:
      change()
    except shutil.SameFileError:
      path.unlink()
    return [path]


KINDS: dict[str, Callable[[Damager], Paths]] = {
    "bits flipped": Damager.flip,
    "cut": Damager.cut,
    "zeroed": Damager.zero,
    "longer": Damager.append,
    "removed": Damager.remove,
    "swapped": Damager.swap,
    "folder, pipe or link for a file": Damager.other_kind,
    "file for a folder": Damager.file_for_folder,
    "step under another's name": Damager.other_step,
    "steps mixed": Damager.mixed_steps,
    "odd names": Damager.odd_name,
    "rows": Damager.rows,
    "JSON of another form": Damager.json,
    "settings recorded": Damager.setting,
    "inputs": Damager.inputs,
    "cached": Damager.cached,
}


def _npy(array: np.ndarray) -> bytes:
  buffer = io.BytesIO()
  np.save(buffer, array)
  return buffer.getvalue()


def _remove(path: pathlib.Path) -> None:
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)
