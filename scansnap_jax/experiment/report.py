"""A report of one experiment: a single HTML file that needs nothing else.

Pictures are part of the file, and its content security policy forbids the
browser to load anything. It reads on paper, on a phone, in light and in dark.
"""

import base64
from collections.abc import Mapping, Sequence
import dataclasses
import html
import importlib.metadata
import json
import math
import pathlib
import platform
import re
import struct
import time
from typing import Any

import numpy as np

from scansnap_jax.experiment import workdir as workdir_lib

_LIBRARIES = ("jax", "flax", "optax", "numpy")
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Figures have 300 pixels an inch; browsers reckon with fewer.
_PIXELS_PER_CSS_PIXEL = 2.4
_INDEX = re.compile(r"\b([A-Za-zα-ω])_(?:\{([^{}]*)\}|(\w))(?!\w)")
# Of Unicode's private range: keeps `_INDEX` from what is the user's, and goes.
_NO_INDEX = "\ue000"
# 1.97 ± 0.03, 12 %, 39 s, 1e-5, an en dash where nothing is known.
_NUMBER = re.compile(r"([-+−]?\d[\d.,]*(e[-+]?\d+)?( ?[±%s].*)?)|–|")

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e;
  --line: #d8dee4; --page: #ffffff; --panel: #f6f8fa; --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --soft: #9aa4af;
  --line: #343b43; --page: #14171b; --panel: #1d2126; --accent: #6cb8e6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 56rem;
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  color: var(--ink); background: var(--page); overflow-wrap: break-word; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 1.25rem; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 3rem 0 .75rem;
  padding-top: .75rem; border-top: 1px solid var(--line); }
p { max-width: 44rem; margin: 0 0 1rem; }
a { color: var(--accent); }
nav ol { margin: 1.25rem 0 0; padding-left: 1.4rem; columns: 2 16rem; }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr;
  gap: .35rem 1.25rem; margin: 0; padding: 1rem 1.25rem; font-size: .875rem;
  background: var(--panel); border-radius: 8px; }
dt { color: var(--soft); }
dd { margin: 0; min-width: 0; white-space: pre-wrap;
  font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
figure { margin: 1.5rem 0 2rem; }
img { display: block; max-width: 100%; height: auto; padding: .5rem;
  background: #ffffff; border: 1px solid var(--line); border-radius: 8px; }
figcaption { margin: .6rem 0; color: var(--soft); font-size: .875rem;
  line-height: 1.5; }
sub { font-size: .75em; line-height: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; line-height: 1.35;
  font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .9rem .35rem 0; text-align: left;
  vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 600; border-bottom: 2px solid var(--line); }
.number { text-align: right; white-space: nowrap; }
@media (max-width: 32rem) { body { padding-top: 1.25rem; }
  h1 { font-size: 1.5rem; } dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .5rem; } img { padding: 0; border-radius: 4px; } }
@media print { :root { --ink: #000000; --soft: #444444; --line: #bbbbbb;
  --page: #ffffff; --panel: #ffffff; --accent: #000000; }
  @page { margin: 18mm; } body { max-width: none; padding: 0;
  font-size: 10pt; } nav { display: none; } dl { border: 1px solid #bbbbbb; }
  figure, tr, dl { break-inside: avoid; } h2 { break-after: avoid; }
  .scroll { overflow: visible; } table { font-size: 7pt; }
  th, td { padding-right: .5rem; } .number { white-space: normal; } }
"""
# A page of A4 has room for as many.
_MOST_COLUMNS = 12


class Link(str):
  """A fact that is the name of a file beside the report, and leads there."""


@dataclasses.dataclass(frozen=True)
class Table:
  """A table.

  Attributes:
    caption: What it shows.
    header: One name a column.
    rows: Cells, shown as `str` gives them. Columns of numbers, which may carry
      a unit or a spread, are aligned on the right.
  """

  caption: str
  header: Sequence[str]
  rows: Sequence[Sequence[object]]

  def __post_init__(self):
    for row in self.rows:
      if len(row) != len(self.header):
        raise ValueError(
            f"Expected {len(self.header)} cells {list(self.header)}, got"
            f" {list(row)}."
        )


@dataclasses.dataclass(frozen=True)
class Figure:
  """A picture.

  Attributes:
    caption: What it shows.
    png_path: Where it is now; the report holds a copy.
  """

  caption: str
  png_path: pathlib.Path


@dataclasses.dataclass(frozen=True)
class Section:
  """A part of the report.

  Attributes:
    title: Its heading.
    text: Paragraphs, separated by empty lines.
    items: Figures and tables that follow, in this order.
  """

  title: str
  text: str = ""
  items: Sequence[Table | Figure] = ()


def render(
    title: str, facts: Mapping[str, str], sections: Sequence[Section]
) -> str:
  """Writes the report as HTML.

  Args:
    title: Title of page and window.
    facts: What was run, how and where, in this order: command, settings,
      device, versions, wall time. Line breaks in values are kept.
    sections: The results.

  Returns:
    The document. Every text is escaped; in captions, tables and paragraphs
    x_n and x_{l|n} are set with a subscript.

  Raises:
    ValueError: If the picture of a figure is no PNG.
  """
  parts = [f"<h1>{html.escape(title)}</h1>", _facts(facts), _contents(sections)]
  parts += [_section(i, s) for i, s in enumerate(sections, start=1)]
  body = "\n".join(part for part in parts if part)
  # Nothing may be loaded, so that the page shows the same anywhere, and cannot
  # be made to call home.
  policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
  return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{html.escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
{body}
</body>
</html>
"""


def write_summary(
    workdir: pathlib.Path, summary: Mapping[str, Any]
) -> dict[str, Any]:
  """Writes summary.json: every number that a report shows.

  Args:
    workdir: The run's folder.
    summary: JSON types and arrays, all of it finite; see `to_json`.

  Returns:
    The summary as it reads back, so that what is drawn is what is written.

  Raises:
    ValueError: A number is not finite.
  """
  plain = lambda value: np.asarray(value).tolist()
  text = json.dumps(summary, indent=2, allow_nan=False, default=plain)
  workdir_lib.write_atomic(workdir / "summary.json", text + "\n")
  return json.loads(text)


def write(
    workdir: pathlib.Path,
    title: str,
    facts: Mapping[str, str],
    sections: Sequence[Section],
) -> pathlib.Path:
  """Writes report.html (`render`) and returns its path."""
  path = workdir / "report.html"
  workdir_lib.write_atomic(path, render(title, facts, sections))
  return path


def to_json(value: object) -> Any:
  """Turns a summary into plain JSON types; what is not finite becomes null."""
  if isinstance(value, Mapping):
    return {str(key): to_json(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [to_json(item) for item in value]
  if hasattr(value, "tolist"):
    return to_json(np.asarray(value).tolist())
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def run_facts(started: float) -> dict[str, str]:
  """What every report says of its run: wall time, versions, settings.

  Args:
    started: `time.monotonic()` at the start of the run.
  """
  seconds = time.monotonic() - started
  versions = [
      f"{name} {importlib.metadata.version(name)}" for name in _LIBRARIES
  ]
  return {
      "wall time": f"{seconds:.1f} s (of this start, with compilation)",
      "versions": ", ".join([f"Python {platform.python_version()}", *versions]),
      "settings": "flags.txt (to run again), config.json (every value)",
  }


def as_is(name: str) -> str:
  """Returns a name of the user's so that no index is set in it: a_1 is a_1."""
  return name.replace("_", f"{_NO_INDEX}_")


def _text(text: str) -> str:
  """Escapes a text and sets the indices of one-letter symbols."""
  return _plain(_INDEX.sub(r"\1<sub>\2\3</sub>", html.escape(text)))


def _plain(text: str) -> str:
  return text.replace(_NO_INDEX, "")


def _facts(facts: Mapping[str, str]) -> str:
  entries = [
      f"<dt>{html.escape(name)}</dt><dd>{_fact(value)}</dd>"
      for name, value in facts.items()
  ]
  return "\n".join(["<dl>", *entries, "</dl>"]) if entries else ""


def _fact(value: str) -> str:
  text = html.escape(value)
  is_link = isinstance(value, Link)
  return f'<a href="{text}">{text}</a>' if is_link else text


def _contents(sections: Sequence[Section]) -> str:
  """Links to the sections; a single one needs none."""
  links = [
      "<li><a"
      f' href="#section-{i}">{_plain(html.escape(section.title))}</a></li>'
      for i, section in enumerate(sections, start=1)
  ]
  return f"<nav><ol>{''.join(links)}</ol></nav>" if len(links) > 1 else ""


def _section(index: int, section: Section) -> str:
  paragraphs = [p for p in re.split(r"\n\s*\n", section.text) if p.strip()]
  parts = [
      f'<section id="section-{index}">',
      f"<h2>{_text(section.title)}</h2>",
      *(f"<p>{_text(p.strip())}</p>" for p in paragraphs),
      *(_item(item) for item in section.items),
      "</section>",
  ]
  return "\n".join(parts)


def _item(item: Table | Figure) -> str:
  return _table(item) if isinstance(item, Table) else _figure(item)


def _figure(figure: Figure) -> str:
  png = figure.png_path.read_bytes()
  if not png.startswith(_PNG_SIGNATURE):
    raise ValueError(f"{figure.png_path} is no PNG.")
  # With its size known the page does not jump while pictures appear.
  size = struct.unpack(">II", png[16:24])
  width, height = (round(length / _PIXELS_PER_CSS_PIXEL) for length in size)
  data = base64.b64encode(png).decode()
  return (
      f'<figure><img width="{width}" height="{height}"'
      f' alt="{_plain(html.escape(figure.caption))}"'
      f' src="data:image/png;base64,{data}">'
      f"<figcaption>{_text(figure.caption)}</figcaption></figure>"
  )


def _turned(table: Table) -> Table:
  """A table of many columns and few rows with a row for each column.

  No page, and no print, is as wide as the columns.
  """
  if len(table.header) <= max(_MOST_COLUMNS, len(table.rows)):
    return table
  first, *others = zip(table.header, *table.rows, strict=True)
  return Table(table.caption, list(map(str, first)), list(map(list, others)))


def _table(table: Table) -> str:
  table = _turned(table)
  rows = [[str(cell) for cell in row] for row in table.rows]
  columns = [[row[i] for row in rows] for i in range(len(table.header))]
  kinds = [
      ' class="number"' if all(map(_NUMBER.fullmatch, column)) else ""
      for column in columns
  ]
  line = lambda tag, cells: "".join(
      f"<{tag}{kind}>{_text(cell)}</{tag}>"
      for kind, cell in zip(kinds, cells, strict=True)
  )
  body = "\n".join(f"<tr>{line('td', row)}</tr>" for row in rows)
  return (
      f"<figure><figcaption>{_text(table.caption)}</figcaption>"
      f'<div class="scroll"><table>\n<thead><tr>{line("th", table.header)}'
      f"</tr></thead>\n<tbody>\n{body}\n</tbody></table></div></figure>"
  )
