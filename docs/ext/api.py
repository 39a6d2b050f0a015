"""Pages of the API: every public module, function, class and method.

A page is a package, with its modules one below the other. All is read from the
sources; nothing is imported.
"""

import ast
from collections.abc import Iterator
import dataclasses
import pathlib
import re

from docs.ext import docstrings

PACKAGES = ("scansnap_jax", "joma", "kernels_pallas", "launch")
_DEFINITIONS = (ast.FunctionDef, ast.ClassDef)


@dataclasses.dataclass(frozen=True)
class Module:
  """A module of the project.

  Attributes:
    name: As it is imported.
    tree: Its source.
    is_package: Whether it is an `__init__`.
  """

  name: str
  tree: ast.Module
  is_package: bool


def modules(root: pathlib.Path) -> list[Module]:
  """Returns the public modules below a folder that holds the packages."""
  found = []
  for package in PACKAGES:
    for path in sorted((root / package).rglob("*.py")):
      parts = path.relative_to(root).with_suffix("").parts
      is_package = parts[-1] == "__init__"
      name = ".".join(parts[:-1] if is_package else parts)
      if not any(p.startswith("_") for p in name.split(".")):
        found.append(Module(name, ast.parse(path.read_text()), is_package))
  return found


def definitions(
    body: list[ast.stmt],
) -> Iterator[ast.FunctionDef | ast.ClassDef]:
  """Yields the public functions and classes of a module or class."""
  seen = set()
  for node in body:
    is_one = isinstance(node, _DEFINITIONS) and not node.name.startswith("_")
    if is_one and not _is_overload(node) and node.name not in seen:
      seen.add(node.name)
      yield node


def public_names(found: list[Module]) -> dict[str, ast.AST]:
  """Returns all that has a place in the API, by its full name."""
  names: dict[str, ast.AST] = {}
  for module in found:
    names[module.name] = module.tree
    for node in definitions(module.tree.body):
      names[f"{module.name}.{node.name}"] = node
      if isinstance(node, ast.ClassDef):
        for method in definitions(node.body):
          names[f"{module.name}.{node.name}.{method.name}"] = method
  return names


def pages(found: list[Module]) -> dict[str, str]:
  """Returns the text of every page, by its name."""
  packages = [module.name for module in found if module.is_package]
  texts = {"index": _index()}
  for package in packages:
    inner = [m for m in found if m.name == package or _is_in(m, package)]
    children = [p for p in packages if p.rpartition(".")[0] == package]
    texts[package] = _page(package, inner, children, set(packages))
  return texts


def _is_in(module: Module, package: str) -> bool:
  return not module.is_package and module.name.rpartition(".")[0] == package


def _index() -> str:
  lines = [
      *_heading("API", "="),
      "Every public module, function, class and method, with the shapes that",
      "its annotations give. Letters in shapes are explained on each module;",
      "modules are imported by their full names.",
      "",
      *_toctree(PACKAGES),
  ]
  return "\n".join(lines) + "\n"


def _page(
    package: str, inner: list[Module], children: list[str], packages: set[str]
) -> str:
  lines = _heading(package, "=")
  for module in sorted(inner, key=lambda m: (not m.is_package, m.name)):
    if not module.is_package:
      lines += _heading(module.name, "-")
    lines += [f".. py:module:: {module.name}", ""]
    doc = ast.get_docstring(module.tree) or ""
    lines += [*docstrings.to_rst(doc, "module"), ""]
    if module.is_package:
      lines += _toctree(children)
    aliases = _aliases(module)
    for node in definitions(module.tree.body):
      lines += _definition(node, aliases, "")
  return "\n".join(lines) + "\n"


def _toctree(names: list[str] | tuple[str, ...]) -> list[str]:
  if not names:
    return []
  lines = [f"   {name.rpartition('.')[2]} <{name}>" for name in names]
  return [".. toctree::", "   :maxdepth: 1", "", *lines, ""]


def _heading(text: str, line: str) -> list[str]:
  text = text.replace("_", r"\_")
  return [text, line * len(text), ""]


def _definition(
    node: ast.FunctionDef | ast.ClassDef,
    aliases: dict[str, str],
    indent: str,
) -> list[str]:
  """A directive with its docstring, and those of a class's methods."""
  if isinstance(node, ast.ClassDef):
    kind, signature = "class", _class_signature(node, aliases)
  else:
    kind, signature = _kind(node, indent), _signature(node, aliases, indent)
  lines = [f"{indent}.. py:{kind}:: {node.name}{signature}"]
  inner = indent + "   "
  for option in _options(node):
    lines.append(f"{inner}:{option}:")
  doc = docstrings.to_rst(ast.get_docstring(node) or "", kind)
  lines += ["", *(inner + line if line else "" for line in doc), ""]
  if isinstance(node, ast.ClassDef):
    for method in definitions(node.body):
      lines += _definition(method, aliases, inner)
  return lines


def _kind(node: ast.FunctionDef, indent: str) -> str:
  if not indent:
    return "function"
  return "property" if "property" in _decorators(node) else "method"


def _options(node: ast.FunctionDef | ast.ClassDef) -> list[str]:
  names = {"classmethod": "classmethod", "staticmethod": "staticmethod"}
  return [names[d] for d in _decorators(node) if d in names]


def _signature(
    node: ast.FunctionDef, aliases: dict[str, str], indent: str
) -> str:
  returns = _resolved(node.returns, aliases) if node.returns else None
  if _kind(node, indent) == "property":
    return f"\n{indent}   :type: {returns}" if returns else ""
  arguments = _resolved(node.args, aliases)
  if indent and "staticmethod" not in _decorators(node):
    arguments = re.sub(r"^(self|cls)(, )?", "", arguments)
  return f"({arguments})" + (f" -> {returns}" if returns else "")


def _class_signature(node: ast.ClassDef, aliases: dict[str, str]) -> str:
  """The arguments of `__init__`, or the fields of a dataclass."""
  for each in node.body:
    if isinstance(each, ast.FunctionDef) and each.name == "__init__":
      return _signature(each, aliases, " ")
  bases = [ast.unparse(base) for base in node.bases]
  is_record = any("dataclass" in d for d in _decorators(node))
  is_record |= any(base in ("NamedTuple", "nn.Module") for base in bases)
  if not is_record:
    return ""
  fields = []
  for each in node.body:
    if not isinstance(each, ast.AnnAssign) or "ClassVar" in ast.unparse(each):
      continue
    default = f" = {ast.unparse(each.value)}" if each.value else ""
    name = ast.unparse(each.target)
    fields.append(f"{name}: {_resolved(each.annotation, aliases)}{default}")
  # Fields without a default may follow those of a base class that have one.
  star = "*, " if any("kw_only" in d for d in _decorators(node)) else ""
  return f"({star}{', '.join(fields)})" if fields else "()"


def _decorators(node: ast.FunctionDef | ast.ClassDef) -> list[str]:
  return [ast.unparse(decorator) for decorator in node.decorator_list]


def _is_overload(node: ast.AST) -> bool:
  return isinstance(node, ast.FunctionDef) and any(
      d.endswith("overload") for d in _decorators(node)
  )


def _aliases(module: Module) -> dict[str, str]:
  """Full names of what a module imports from this project, or defines."""
  found = {}
  for node in module.tree.body:
    if isinstance(node, ast.ClassDef):
      found[node.name] = f"{module.name}.{node.name}"
    elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
      name = node.targets[0].id
      found[name] = f"{module.name}.{name}"
  for node in ast.walk(module.tree):
    if isinstance(node, ast.ImportFrom) and node.module:
      if node.module.split(".")[0] in PACKAGES:
        for alias in node.names:
          found[alias.asname or alias.name] = f"{node.module}.{alias.name}"
  return found


class _Full(ast.NodeTransformer):
  """Writes names of this project out, so that they become links."""

  def __init__(self, aliases: dict[str, str]):
    self.aliases = aliases

  def visit_Name(self, node: ast.Name) -> ast.expr:
    full = self.aliases.get(node.id)
    # ~ shows the last part alone.
    return ast.parse(f"~{full}", mode="eval").body if full else node

  def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
    head, _, rest = ast.unparse(node).partition(".")
    if head not in self.aliases:
      return node
    full = f"~{self.aliases[head]}.{rest}"
    return ast.parse(full, mode="eval").body

  def visit_arg(self, node: ast.arg) -> ast.arg:
    if node.annotation:
      node.annotation = self.visit(node.annotation)
    return node


def _resolved(node: ast.AST, aliases: dict[str, str]) -> str:
  """Returns arguments or an annotation as source, names written out."""
  text, full = ast.unparse(node), _Full(aliases)
  if not isinstance(node, ast.arguments):
    return ast.unparse(full.visit(ast.parse(text, mode="eval").body))
  function = ast.parse(f"def f({text}): pass").body[0]
  assert isinstance(function, ast.FunctionDef)
  arguments = function.args
  full.generic_visit(arguments)
  return ast.unparse(arguments)
