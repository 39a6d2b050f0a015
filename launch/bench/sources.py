"""What is counted of Python files without importing them, see `house`."""

import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import io
import pathlib
import tokenize

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclasses.dataclass(frozen=True)
class Source:
  """One file: its path from the root, its text and its syntax tree."""

  path: str
  text: str
  tree: ast.Module

  @property
  def num_lines(self) -> int:
    """Number of lines, blank ones included."""
    return len(self.text.splitlines())

  @property
  def module(self) -> str:
    """Dotted name; that of the package for an `__init__`."""
    return (
        self.path.removesuffix(".py")
        .removesuffix("/__init__")
        .replace("/", ".")
    )


@dataclasses.dataclass(frozen=True)
class Function:
  """A function: where it is, its lines, and whether others may call it."""

  where: str
  node: FunctionNode
  is_public: bool
  is_method: bool

  @property
  def num_lines(self) -> int:
    """From `def` to the last line."""
    return (self.node.end_lineno or 0) - self.node.lineno + 1

  @property
  def num_doc_lines(self) -> int:
    """Lines of the docstring: what a caller reads instead of the function."""
    first = self.node.body[0]
    is_doc = isinstance(first, ast.Expr) and isinstance(
        first.value, ast.Constant
    )
    return (first.end_lineno or 0) - first.lineno + 1 if is_doc else 0


def read(root: pathlib.Path, packages: Iterable[str]) -> list[Source]:
  """Reads the Python files of packages, by path."""
  paths = [p for package in packages for p in (root / package).rglob("*.py")]
  texts = {
      p.relative_to(root).as_posix(): p.read_text(encoding="utf-8")
      for p in sorted(paths)
  }
  return [Source(path, text, ast.parse(text)) for path, text in texts.items()]


def folders(sources: Iterable[Source]) -> dict[str, int]:
  """Number of files of each folder, `__init__` aside."""
  found: dict[str, int] = {}
  for source in sources:
    folder, _, name = source.path.rpartition("/")
    found[folder] = found.get(folder, 0) + (name != "__init__.py")
  return found


def functions(source: Source) -> list[Function]:
  """All functions of a file, in its order, with those inside of others."""
  found: list[Function] = []

  def visit(node: ast.AST, names: tuple[str, ...], kind: str) -> None:
    for child in ast.iter_child_nodes(node):
      if not isinstance(child, FunctionNode | ast.ClassDef):
        visit(child, names, kind)
        continue
      inner = (*names, child.name)
      if isinstance(child, ast.ClassDef):
        # A class within a function stays as private as the function's.
        visit(child, inner, "class" if kind != "function" else "local class")
        continue
      is_method = "class" in kind and not _is_static(child)
      is_public = kind in ("module", "class") and not any(map(_hides, inner))
      where = f"{source.path}:{child.lineno} {'.'.join(inner)}"
      found.append(Function(where, child, is_public, is_method))
      visit(child, inner, "function")

  visit(source.tree, (), "module")
  return found


def _hides(name: str) -> bool:
  """Whether a name is private; `__call__` and its like are not."""
  return name.startswith("_") and not name.endswith("__")


def _is_static(function: FunctionNode) -> bool:
  names = [ast.unparse(x) for x in function.decorator_list]
  return "staticmethod" in names


def annotated(found: Iterable[Function]) -> str:
  """Share of parameters that have an annotation, self and cls aside."""
  flags = [
      parameter.annotation is not None
      for function in found
      for parameter in _parameters(function.node)[function.is_method :]
  ]
  return percent(sum(flags), len(flags))


def _parameters(function: FunctionNode) -> list[ast.arg]:
  given = function.args
  ends = [x for x in (given.vararg, given.kwarg) if x]
  return [*given.posonlyargs, *given.args, *given.kwonlyargs, *ends]


def bare_any(sources: Iterable[Source]) -> str:
  """Share of `Any` alone among annotations."""
  found = [
      ast.unparse(annotation).strip("'\"").removeprefix("typing.") == "Any"
      for source in sources
      for node in ast.walk(source.tree)
      for annotation in _annotations(node)
  ]
  return percent(sum(found), len(found))


def _annotations(node: ast.AST) -> Iterator[ast.expr]:
  """Yields the annotation of a parameter, a result or a variable."""
  if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation:
    yield node.annotation
  if isinstance(node, FunctionNode) and node.returns:
    yield node.returns


def comments(sources: Sequence[Source]) -> str:
  """Lines with a comment alone, per 100 lines."""
  number = 0
  for source in sources:
    lines = io.StringIO(source.text).readline
    for token in tokenize.generate_tokens(lines):
      if token.type == tokenize.COMMENT:
        number += not token.line[: token.start[1]].strip()
  num_lines = sum(source.num_lines for source in sources)
  return f"{100 * number / max(num_lines, 1):.1f}"


def cycles(sources: Sequence[Source]) -> list[list[str]]:
  """Groups of modules each of which reaches the others by imports."""
  modules = {source.module for source in sources}
  graph = {s.module: set(_imported(s)) & modules for s in sources}
  reach = {module: _reachable(graph, module) for module in graph}
  found = {
      tuple(sorted(b for b in reach[a] if a in reach[b]))
      for a in graph
      if a in reach[a]
  }
  return [list(cycle) for cycle in sorted(found)]


def _imported(source: Source) -> Iterator[str]:
  """Yields modules; of `from a import b` a.b and a, for b may be a name."""
  for node in ast.walk(source.tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield from (f"{node.module}.{alias.name}" for alias in node.names)
      yield str(node.module)


def _reachable(graph: Mapping[str, set[str]], start: str) -> set[str]:
  """Modules that a path of one import or more leads to."""
  found: set[str] = set()
  ahead = list(graph[start])
  while ahead:
    module = ahead.pop()
    if module not in found:
      found.add(module)
      ahead.extend(graph[module])
  return found


def percent(part: int, whole: int) -> str:
  """A share as text."""
  return f"{100 * part / whole:.1f} %" if whole else "none"
