"""Applies planted faults to a copy of the tree and wants tests to fail.

A fault is a row of a table: a file, a text that occurs in it once, what stands
there instead, why a reader would call that a bug, and the tests that must fail
by it. The tables are the other modules of this folder, one a package:

  scansnap_jax/metrics.py
  - the text as it is
  + the text with the fault
  ? why it is one
  @ a test file or file::Class, where it is not the file's mirror
  @ test_that_fails, of which all variants run; all tests where none is named

  python -m tests.alterations.apply          applies all, two at a time
  python -m tests.alterations.apply theory   those of files with that word
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent import futures
import dataclasses
import functools
import importlib
import multiprocessing
import os
import pathlib
import shutil
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[2]
_COPIED = ("scansnap_jax", "joma", "kernels_pallas", "launch", "tests", "docs")
_HERE = str(ROOT)
_CACHE = "JAX_COMPILATION_CACHE_DIR"
_PRELOADED = (
    *("jax", "flax.linen", "optax", "chex", "beartype", "hypothesis", "pytest"),
    *("orbax.checkpoint", "matplotlib.pyplot", "jax.experimental.pallas.tpu"),
)
_PYTEST = (
    *("-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--tb=line"),
    # Whichever tests are slow by now, a row means those that it names.
    *("-m", "slow or not slow"),
)
# A test that hangs by the fault has not failed.
_TIMEOUT = 500
# What pytest returns when tests ran and some failed.
_FAILED = 1


@dataclasses.dataclass(frozen=True)
class Row:
  """A fault.

  Attributes:
    path: Of the file, from the tree's root.
    before: What stands there; once.
    after: What is planted.
    why: What is wrong then.
    places: Test files or classes; its mirror where nothing is named.
    names: Of the tests there that fail by it; none is all.
  """

  path: str
  before: str
  after: str
  why: str
  places: tuple[str, ...]
  names: tuple[str, ...]

  @property
  def tests(self) -> list[str]:
    """What pytest is called with."""
    return [*self.places, *(["-k", " or ".join(self.names)] * bool(self.names))]

  @property
  def name(self) -> str:
    """Short and stable: a test's parameter."""
    return f"{self.path.removesuffix('.py')}: {self.why}"


def parse(table: str) -> Iterator[Row]:
  """The rows of a table; see the module."""
  for block in table.strip().split("\n\n"):
    path, *lines = block.strip().split("\n")
    before, after, why, tests = (
        tuple(line[2:] for line in lines if line[0] == mark) for mark in "-+?@"
    )
    yield Row(
        path,
        "\n".join(before),
        "\n".join(after),
        " ".join(why),
        tuple(test for test in tests if not test.startswith("test_"))
        or (f"tests/{path.removesuffix('.py')}_test.py",),
        tuple(test for test in tests if test.startswith("test_")),
    )


@functools.cache
def rows() -> tuple[Row, ...]:
  """All rows, in the order of the tables' names."""
  here = pathlib.Path(__file__).parent
  names = sorted(path.stem for path in here.glob("rows_*.py"))
  modules = [importlib.import_module(f"tests.alterations.{n}") for n in names]
  return tuple(row for module in modules for row in parse(module.TABLE))


def copy_tree(folder: pathlib.Path) -> None:
  """Copies what the tests need, without what is compiled."""
  ignore = shutil.ignore_patterns("__pycache__")
  for name in _COPIED:
    shutil.copytree(ROOT / name, folder / name, ignore=ignore)
  for name in ("pyproject.toml", "README.md"):
    shutil.copy(ROOT / name, folder / name)


def _forget(path: pathlib.Path) -> None:
  """Removes compiled forms: a fault may keep size and second of the text."""
  for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
    compiled.unlink()


def is_caught(row: Row, folder: pathlib.Path) -> tuple[bool, str]:
  """Whether the row's tests fail in a copy, and what pytest said last."""
  path, log = folder / row.path, folder / "log.txt"
  text = path.read_text()
  path.write_text(text.replace(row.before, row.after))
  _forget(path)
  os.environ.setdefault(_CACHE, str(folder / "compiled"))
  # Processes that have imported jax and its like already: most of the time.
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload([*_PRELOADED])
  process = context.Process(target=_test, args=(folder, row.tests, log))
  try:
    process.start()
    process.join(_TIMEOUT)
    if process.exitcode is None:
      process.kill()
      return False, "timed out"
  finally:
    path.write_text(text)
    _forget(path)
  return process.exitcode == _FAILED, log.read_text()[-600:]


def _test(
    folder: pathlib.Path, tests: Sequence[str], log: pathlib.Path
) -> None:
  """Runs tests of a copy in this process, which has nothing else to do."""
  os.chdir(folder)
  sys.path[:] = [str(folder), *(p for p in sys.path if p not in ("", _HERE))]
  for name in [n for n in sys.modules if n.partition(".")[0] in _COPIED]:
    del sys.modules[name]
  with open(log, "wb") as file:
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
  code = importlib.import_module("pytest").main([*_PYTEST, *tests])
  sys.stdout.flush()
  os._exit(int(code))


def run(chosen: Sequence[Row], num_processes: int = 2) -> Iterable[Row]:
  """Applies rows, prints what becomes of each, and yields those not caught."""
  folders: list[pathlib.Path] = []

  def one(row: Row) -> tuple[Row, bool, str, float]:
    folder, start = folders.pop(), time.monotonic()
    caught, said = is_caught(row, folder)
    folders.append(folder)
    return row, caught, said, time.monotonic() - start

  with (
      tempfile.TemporaryDirectory() as temporary,
      futures.ThreadPoolExecutor(num_processes) as pool,
  ):
    os.environ.setdefault(_CACHE, str(pathlib.Path(temporary) / "compiled"))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
    for number in range(num_processes):
      folders.append(pathlib.Path(temporary) / str(number))
      copy_tree(folders[-1])
    for row, caught, said, seconds in pool.map(one, chosen):
      print(f"{'ok ' if caught else 'NOT'} {seconds:4.0f} s  {row.name}")
      if not caught:
        print(f"{row.tests}\n- {row.before}\n+ {row.after}\n{said}")
        yield row
      sys.stdout.flush()


def main(words: Sequence[str]) -> int:
  """Applies the rows that have a word in their path or reason."""
  chosen = [
      row for row in rows() if not words or any(w in row.name for w in words)
  ]
  start = time.monotonic()
  missed = list(run(chosen))
  seconds = time.monotonic() - start
  print(f"{len(chosen) - len(missed)} of {len(chosen)} in {seconds:.0f} s")
  return min(len(missed), 1)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
