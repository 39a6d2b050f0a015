"""Prints the figures of the source code as one Markdown table.

  python -m launch.bench.house
  python -m launch.bench.house --root=../before --root=.

reads files, imports none of them, and takes some seconds. With several roots
each has a column. Below the table are what stands out of the last one: folders
above 14 files, files above 400 lines, functions above 50, import cycles, and
who names which attention system or cache policy outside its own file.

How it counts:

  function lines  from `def` to the last line, decorators aside; functions
                  within functions are counted, and are part of the outer one as
                  well
  public          no part of the dotted name begins with one underscore, and
                  no function is around it
  annotated       parameters with an annotation, self and cls aside
  bare Any        `Any` alone, of all annotations of parameters, results and
                  variables
  comment lines   lines with nothing but a comment, per 100 lines of any kind
  cycles          groups of modules that import each other, imports within
                  functions included
  names           strings that are a name or `name:...`, docstrings aside, and
                  identifiers or imports of its class; tables are of this tree,
                  and names that are ordinary words are left out, as are those
                  of a file's own parameters and fields, which messages name
"""

import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import math
import pathlib
import statistics

from absl import flags

from launch.bench import harness
from launch.bench import sources as sources_lib
from launch.command import app
from scansnap_jax.experiment import errors

_HERE = pathlib.Path(__file__).parents[2]
_PRODUCT = ("scansnap_jax", "joma", "kernels_pallas", "launch")
_TABLES = {
    "joma/systems/names.py": ("SYSTEMS",),
    "joma/systems/cache_policies/names.py": ("POLICIES", "WRAPPERS"),
}
# Words of ordinary English: as strings they say other things elsewhere.
_ORDINARY = {"full", "window", "random"}
_MOST_FILES, _MOST_LINES, _MOST_FUNCTION_LINES = 14, 400, 50


@dataclasses.dataclass(frozen=True)
class System:
  """A name of a table.

  Attributes:
    name: As flags and configs give it.
    stem: Of its own file's name.
    classname: Its class.
  """

  name: str
  stem: str
  classname: str


@dataclasses.dataclass(frozen=True)
class House:
  """What is counted of a tree.

  Attributes:
    product: Files of the packages.
    tests: Files of the tests.
    functions: All of the product.
    crowded: Folders with too many files, and how many.
    cycles: Groups of modules that import each other.
    named: By each system's name the files that name it and are not its own.
  """

  product: Sequence[sources_lib.Source]
  tests: Sequence[sources_lib.Source]
  functions: Sequence[sources_lib.Function]
  crowded: Mapping[str, int]
  cycles: Sequence[Sequence[str]]
  named: Mapping[str, Sequence[str]]


_FLAGS = flags.FLAGS if __name__ == "__main__" else flags.FlagValues()
_ROOTS = flags.DEFINE_multi_string(
    "root",
    str(_HERE),
    "Tree that is surveyed. Given several times, each tree has a column.",
    flag_values=_FLAGS,
)


def main(_: list[str]) -> None:
  """Prints the table and what stands out."""
  known, houses = systems(_HERE), {}
  for root in _ROOTS.value:
    if not pathlib.Path(root).is_dir():
      raise errors.UserError(f"--root={root} is no folder.")
    houses[root] = survey(pathlib.Path(root), known)
  print(table({root: figures(house) for root, house in houses.items()}))
  for line in details(houses[_ROOTS.value[-1]]):
    print(f"- {line}")


def survey(root: pathlib.Path, known: Sequence[System]) -> House:
  """Reads a tree.

  Args:
    root: Folder with the packages.
    known: Systems whose names are sought.
  """
  product, tests = sources_lib.read(root, _PRODUCT), sources_lib.read(
      root, ("tests",)
  )
  return House(
      product=product,
      tests=tests,
      functions=[
          f for source in product for f in sources_lib.functions(source)
      ],
      crowded={
          folder: number
          for folder, number in sources_lib.folders([*product, *tests]).items()
          if number > _MOST_FILES
      },
      cycles=sources_lib.cycles(product),
      named=named(product, known),
  )


def table(by_root: Mapping[str, Mapping[str, str]]) -> str:
  """Markdown with a row a figure and a column a root."""
  columns = {"figure": ("figure", str)} | {r: (r, str) for r in by_root}
  labels = next(iter(by_root.values()))
  rows = [
      {"figure": label} | {root: by_root[root][label] for root in by_root}
      for label in labels
  ]
  return harness.table(columns, rows)


def figures(house: House) -> dict[str, str]:
  """Figures of a tree, as text by their labels."""
  product, all_functions = house.product, house.functions
  launch = [x for x in product if x.path.startswith("launch/")]
  files = [x.num_lines for x in product if not x.path.endswith("__init__.py")]
  lengths = [f.num_lines for f in all_functions]
  found = [len(paths) for paths in house.named.values()]
  return {
      "lines of the product": f"{_num_lines(product):,}",
      "lines of launch": f"{_num_lines(launch):,}",
      "lines of tests": f"{_num_lines(house.tests):,}",
      "files of the product": f"{len(files):,}",
      "files a folder, max": _largest(sources_lib.folders(product)),
      "files a folder of tests, max": _largest(
          sources_lib.folders(house.tests)
      ),
      "folders above 14 files": str(len(house.crowded)),
      "file lines, median / p90 / max": spread(files),
      "files above 400 lines": str(sum(n > _MOST_LINES for n in files)),
      "function lines, median / p90 / max": spread(lengths),
      "functions above 50 lines": str(
          sum(n > _MOST_FUNCTION_LINES for n in lengths)
      ),
      "those above without their docstring": str(
          sum(
              f.num_lines - f.num_doc_lines > _MOST_FUNCTION_LINES
              for f in all_functions
          )
      ),
      "annotated parameters, public": sources_lib.annotated(
          f for f in all_functions if f.is_public
      ),
      "annotated parameters, private": sources_lib.annotated(
          f for f in all_functions if not f.is_public
      ),
      "bare Any, of annotations": sources_lib.bare_any(product),
      "comment lines per 100": sources_lib.comments(product),
      "import cycles": str(len(house.cycles)),
      "names in other files, sum over names": str(sum(found)),
      "names in other files, largest": str(max(found, default=0)),
  }


def details(house: House) -> Iterator[str]:
  """Says what is above its limit, and who names what."""
  for folder, number in house.crowded.items():
    yield f"{folder} has {number} files"
  for source in [*house.product, *house.tests]:
    if source.num_lines > _MOST_LINES:
      yield f"{source.path} has {source.num_lines} lines"
  for function in house.functions:
    if function.num_lines > _MOST_FUNCTION_LINES:
      doc = function.num_doc_lines
      told = f", {doc} of them its docstring" if doc > 1 else ""
      yield f"{function.where} has {function.num_lines} lines{told}"
  for cycle in house.cycles:
    yield f"cycle: {', '.join(cycle)}"
  for name, paths in house.named.items():
    if paths:
      yield f"{name} is named by {', '.join(paths)}"


def systems(root: pathlib.Path) -> list[System]:
  """Reads the names tables of a tree, without importing them."""
  found = []
  for path, variables in _TABLES.items():
    tree = ast.parse((root / path).read_text(encoding="utf-8"))
    for node in tree.body:
      if not isinstance(node, ast.AnnAssign) or node.value is None:
        continue
      if ast.unparse(node.target) in variables:
        for name, entry in ast.literal_eval(node.value).items():
          module, _, classname = entry.partition(":")
          found.append(System(name, module.rpartition(".")[2], classname))
  return [system for system in found if system.name not in _ORDINARY]


def named(
    sources: Iterable[sources_lib.Source], known: Sequence[System]
) -> dict[str, list[str]]:
  """Files that name each system, outside of its own and the tables."""
  found: dict[str, list[str]] = {system.name: [] for system in known}
  for source in sources:
    if source.path in _TABLES:
      continue
    words = _words(source.tree)
    for system in known:
      is_own = pathlib.PurePath(source.path).stem == system.stem
      if not is_own and {system.name, f"class {system.classname}"} & words:
        found[system.name].append(source.path)
  return found


def _words(tree: ast.Module) -> set[str]:
  """Beginnings of strings, and identifiers with `class ` before them."""
  docstrings = {
      id(node.value)
      for node in ast.walk(tree)
      if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
  }
  found = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
      if id(node) not in docstrings:
        found.add(node.value.partition(":")[0])
    elif isinstance(node, ast.Name):
      found.add(f"class {node.id}")
    elif isinstance(node, ast.Attribute):
      found.add(f"class {node.attr}")
    elif isinstance(node, ast.ImportFrom):
      found |= {f"class {alias.name}" for alias in node.names}
  for node in ast.walk(tree):
    if isinstance(node, ast.arg):
      found.discard(node.arg)
    elif isinstance(node, ast.AnnAssign):
      found.discard(ast.unparse(node.target))
  return found


def spread(numbers: Sequence[int]) -> str:
  """Median, the smallest that 90 % do not exceed, and the largest."""
  if not numbers:
    return "none"
  ordered = sorted(numbers)
  p90 = ordered[math.ceil(0.9 * len(ordered)) - 1]
  return f"{statistics.median(ordered):g} / {p90} / {ordered[-1]}"


def _num_lines(sources: Iterable[sources_lib.Source]) -> int:
  return sum(source.num_lines for source in sources)


def _largest(numbers: Mapping[str, int]) -> str:
  folder = max(numbers, key=lambda name: numbers[name], default="")
  return f"{numbers[folder]} ({folder})" if folder else "none"


if __name__ == "__main__":
  app.run(main, keeps_compiled=False)
