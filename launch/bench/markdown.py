"""Tables of the benchmarks, as Markdown."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

# By a row's key: a title, and what makes text of a value.
Columns = Mapping[str, tuple[str, Callable[[Any], str]]]


def table(columns: Columns, rows: Iterable[Mapping[str, Any]]) -> str:
  """Formats rows; what a row lacks, or has as None, is empty."""
  lines = [
      f"| {' | '.join(title for title, _ in columns.values())} |",
      f"|{' --- |' * len(columns)}",
  ]
  for row in rows:
    cells = (
        "" if row.get(name) is None else form(row[name])
        for name, (_, form) in columns.items()
    )
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)
