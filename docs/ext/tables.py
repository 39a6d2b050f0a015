"""Tables of policies, systems, kernels and studies, from the sources.

Names come from the lists in the code, what a thing is from its docstring, the
paper from its class or docstring, the year from the paper's number, and the
paper's settings from the docstring's paragraph that begins so. When to use it
is the one line that a person writes, in docs/when_to_use.toml. Nothing is
imported that needs jax.
"""

import ast
from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
import re
import tomllib

from joma.systems import names as system_names
from joma.systems.cache_policies import names as policy_names

LINES = "docs/when_to_use.toml"
_NUMBER = re.compile(r"\b(\d{4}\.\d{5})\b")
_SETTINGS = re.compile(r"^Paper's settings: (.+?)\.?$", re.DOTALL)
_URL = re.compile(r"https?://[^\s)\"']+")
_SCRIPTS = {
    "launch/attention.py": "launch.attention --study",
    "launch/joma.py": "launch.joma --preset",
}


@dataclasses.dataclass(frozen=True)
class Row:
  """One thing of a table.

  Attributes:
    name: As flags give it.
    what: What it is, of its docstring.
    paper: An address; None where there is none.
    year: Of the paper.
    file: Below the project's root.
    when: When to use it; of a study, how to run it.
    settings: Those of the paper, where the docstring states them.
  """

  name: str
  what: str
  paper: str | None
  year: str
  file: str
  when: str
  settings: str = ""


def lines_of(root: pathlib.Path) -> dict[str, dict[str, str]]:
  """Returns the lines that a person wrote, by table and name."""
  return tomllib.loads((root / LINES).read_text())


def policies(root: pathlib.Path) -> list[Row]:
  """Cache policies, wrappers and those that need a measurement."""
  package = policy_names.__name__.rpartition(".")[0]
  named = {
      **policy_names.POLICIES,
      **policy_names.WRAPPERS,
      **policy_names.MEASURED,
      **policy_names.FITTED,
  }
  full = {name: package + entry for name, entry in named.items()}
  return _of_classes(root, full, lines_of(root)["policies"], by_class=True)


def systems(root: pathlib.Path) -> list[Row]:
  """Attention systems."""
  lines = lines_of(root)["systems"]
  named = dict(sorted(system_names.SYSTEMS.items()))
  return _of_classes(root, named, lines, by_class=False)


def kernels(root: pathlib.Path) -> list[Row]:
  """Ops of kernels_pallas: the folders with an api."""
  lines, rows = lines_of(root)["kernels"], []
  for path in sorted((root / "kernels_pallas").glob("*/api.py")):
    doc = ast.get_docstring(ast.parse(path.read_text())) or ""
    file, name = path.relative_to(root).as_posix(), path.parent.name
    rows.append(_row(name, _first(doc), [doc], file, lines))
  return rows


def studies(root: pathlib.Path) -> list[Row]:
  """Studies, with the command of each."""
  rows = []
  for script, command in _SCRIPTS.items():
    for name, module in _studies_of(root / script).items():
      file = module.replace(".", "/") + ".py"
      doc = ast.get_docstring(ast.parse((root / file).read_text())) or ""
      how = {name: f"`python -m {command}={name}`"}
      rows.append(_row(name, _first(doc), [doc], file, how))
  return rows


def table(rows: Sequence[Row], when: str) -> str:
  """Returns rows as a table in Markdown.

  Args:
    rows: In the order of the table.
    when: What the column of that name says.
  """
  settings = "the paper's settings"
  head = ["name, file", "what it is", "paper", "year", when, settings]
  body = [
      [_name(r), r.what, _link(r.paper), r.year, r.when, r.settings]
      for r in rows
  ]
  lines = [head, ["---"] * len(head), *(map(_cell, cells) for cells in body)]
  return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def tables(root: pathlib.Path) -> dict[str, str]:
  """Returns all tables, by their names."""
  when = "when to use it"
  return {
      "policies": table(policies(root), when),
      "systems": table(systems(root), when),
      "kernels": table(kernels(root), when),
      "studies": table(studies(root), "command"),
  }


def _of_classes(
    root: pathlib.Path,
    named: Mapping[str, str],
    lines: Mapping[str, str],
    *,
    by_class: bool,
) -> list[Row]:
  rows = []
  for name, entry in named.items():
    module, _, cls = entry.partition(":")
    file = module.replace(".", "/") + ".py"
    tree = ast.parse((root / file).read_text())
    node = next(
        n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == cls
    )
    docs = [ast.get_docstring(node) or "", ast.get_docstring(tree) or ""]
    what = _first(docs[0] if by_class else docs[1])
    rows.append(_row(name, what, [_paper_of(node), *docs], file, lines))
  return rows


def _paper_of(node: ast.ClassDef) -> str:
  """The class's own `paper`, or nothing."""
  for each in node.body:
    if isinstance(each, ast.AnnAssign) and each.value is not None:
      if ast.unparse(each.target) == "paper":
        return str(ast.literal_eval(each.value))
  return ""


def _row(
    name: str,
    what: str,
    sources: list[str],
    file: str,
    lines: Mapping[str, str],
) -> Row:
  """Finds the paper in the first source that has one."""
  paper, year = None, ""
  for text in sources:
    number, url = _NUMBER.search(text), _URL.search(text)
    if number:
      paper = f"https://arxiv.org/abs/{number[1]}"
      year = f"20{number[1][:2]}"
    elif url:
      paper = url[0].rstrip(".,")
    year = year or next(iter(re.findall(r"\b20[12]\d\b", text)), "")
    if paper or year:
      break
  settings = next(filter(None, map(_settings_of, sources)), "")
  return Row(name, what, paper, year, file, lines.get(name, ""), settings)


def _settings_of(doc: str) -> str:
  """The paragraph of the paper's settings, or nothing."""
  for paragraph in doc.split("\n\n"):
    if found := _SETTINGS.match(" ".join(paragraph.split())):
      return found[1]
  return ""


def _first(doc: str) -> str:
  """The first sentence, without its paper, which has a column of its own."""
  text = " ".join(doc.partition("\n\n")[0].split())
  return re.sub(r" \((?:after )?(?:arXiv )?\d{4}\.\d{5}\)", "", text)


def _cell(text: str) -> str:
  return text.replace("|", r"\|")


def _link(paper: str | None) -> str:
  if paper is None:
    return ""
  number = _NUMBER.search(paper)
  return f"[{number[1] if number else paper.split('/')[2]}]({paper})"


def _name(row: Row) -> str:
  """The name, which leads to the file's place in the API."""
  module = row.file.removesuffix(".py").replace("/", ".")
  return f"{{py:mod}}`{row.name} <{module}>`"


def _studies_of(script: pathlib.Path) -> dict[str, str]:
  """The modules of a script's `_STUDIES`, by their names."""
  tree = ast.parse(script.read_text())
  imported = {
      alias.name: f"{node.module}.{alias.name}"
      for node in tree.body
      if isinstance(node, ast.ImportFrom)
      for alias in node.names
  }
  for node in tree.body:
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
      if ast.unparse(node.targets[0]) == "_STUDIES":
        return {
            ast.literal_eval(key): imported[ast.unparse(value).split(".")[0]]
            for key, value in zip(
                node.value.keys, node.value.values, strict=True
            )
            if key is not None
        }
  raise ValueError(f"{script} has no _STUDIES.")
