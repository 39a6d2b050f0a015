"""Docstrings of this project as reStructuredText.

They are written for the eye: prose, indented or aligned lines for formulas and
tables, names in single backticks, and Google's sections at the end.
"""

import re

_SECTION = re.compile(
    r"^(Args|Attributes|Example|Raises|Returns|Yields):$", re.MULTILINE
)
_CODE = re.compile(r"`([^`]+)`")
# Three spaces between words, or a line that starts further in: a table.
_ALIGNED = re.compile(r"\S {2,}\S")
_ITEM = re.compile(r"(?:[-*]|\d+\.) ")
_CONFIG = dict(
    napoleon_use_ivar=True, napoleon_use_param=True, napoleon_use_rtype=False
)


def to_rst(docstring: str, what: str) -> list[str]:
  """Returns the lines of a docstring.

  Args:
    docstring: Without its indentation.
    what: Of a module, class or function, as napoleon asks.
  """
  start = _SECTION.search(docstring)
  place = start.start() if start else len(docstring)
  prose, sections = docstring[:place], docstring[place:]
  lines = _prose(prose)
  if sections:
    # Tests of tables and names do without Sphinx.
    from sphinx.ext import napoleon

    config = napoleon.Config(**_CONFIG)
    google = napoleon.GoogleDocstring(escaped(sections), config, what=what)
    lines += ["", *"\n".join(google.lines()).split("\n")]
  return lines


def escaped(text: str) -> str:
  """Returns prose whose signs mean themselves, and whose names are code."""
  parts = _CODE.split(text)
  for place, part in enumerate(parts):
    if place % 2:
      parts[place] = f"``{' '.join(part.split())}``"
    else:
      part = re.sub(r"(\\|\||(?<!^)\*|`)", r"\\\1", part)
      # A word's last underscore would make it a link; * of *args stays.
      parts[place] = re.sub(r"_(?!\w)", r"\\_", part)
  return _apart(parts)


def _apart(parts: list[str]) -> str:
  """Joins text and code: code must not touch a word."""
  joined = parts[0]
  for code, text in zip(parts[1::2], parts[2::2], strict=True):
    before = "\\ " if joined[-1:] and re.match(r"[\w)\]]", joined[-1]) else ""
    after = "\\ " if re.match(r"[\w(]", text) else ""
    joined += before + code + after + text
  return joined


def _prose(text: str) -> list[str]:
  """Paragraphs; what is indented or aligned is shown as it stands."""
  lines: list[str] = []
  for block in re.split(r"\n\s*\n", text.strip("\n")):
    rows = block.split("\n")
    is_item = bool(_ITEM.match(block))
    if not is_item and any(_ALIGNED.search(row) for row in rows):
      groups = [(True, rows)]
    else:
      groups = _groups(rows, is_item)
    for is_literal, group in groups:
      lines += _literal(group) if is_literal else _paragraph(group, is_item)
      lines.append("")
  return lines


def _groups(rows: list[str], is_item: bool) -> list[tuple[bool, list[str]]]:
  found: list[tuple[bool, list[str]]] = []
  for row in rows:
    is_literal = row.startswith("  ") and not is_item
    if not found or found[-1][0] != is_literal:
      found.append((is_literal, []))
    found[-1][1].append(row)
  return found


def _literal(rows: list[str]) -> list[str]:
  return [".. code-block:: text", "", *(f"   {row}" for row in rows)]


def _paragraph(rows: list[str], is_item: bool) -> list[str]:
  if not is_item:
    return escaped("\n".join(rows)).split("\n")
  lines: list[str] = []
  for row in rows:
    marker = _ITEM.match(row)
    if marker:
      lines += ["", marker.group() + escaped(row[marker.end() :])]
    else:
      lines.append(escaped(row))
  return lines
