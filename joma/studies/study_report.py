"""Figures, summary and report of a finished study (`study.Study`)."""

from collections.abc import Iterator, Mapping
import pathlib
from typing import Any

from joma.studies import study as study_lib
from scansnap_jax.experiment import figures
from scansnap_jax.experiment import report

# Longer ones are read off the figure, or out of summary.json.
_LONGEST_TABLE = 100


def write(
    workdir: pathlib.Path,
    name: str,
    study: study_lib.Study,
    summary: Mapping[str, Any],
    facts: Mapping[str, str],
    started: float,
) -> pathlib.Path:
  """Writes figures/, summary.json and report.html of a finished study.

  Args:
    workdir: The run's folder.
    name: Name of the study: its key in summary.json and its figure's file name.
    study: What was run.
    summary: What it measured.
    facts: What the report says of the run first.
    started: `time.monotonic()` at the start of the run.

  Returns:
    The path of the report.
  """
  # What is drawn is what is written: anyone can draw it again.
  summary = report.write_summary(workdir, {name: report.to_json(summary)})[name]
  png, _ = figures.save(study.draw(summary), workdir / "figures", name)
  items = [report.Figure(study.caption, png), *tables(summary)]
  section = report.Section(study.title, summary["finding"], items)
  facts = {**facts, **report.run_facts(started)}
  return report.write(workdir, study.report_title, facts, [section])


def tables(summary: Mapping[str, Any]) -> list[report.Table]:
  """Lays a summary out: its single numbers, and each list of rows."""
  scalars = [cell for cell in _cells(summary) if cell[0] != "finding"]
  found = []
  if scalars:
    found.append(report.Table("Measured.", ("quantity", "value"), scalars))
  for name, rows in summary.items():
    if _is_rows(rows) and len(rows) <= _LONGEST_TABLE:
      laid_out = [dict(_cells(row)) for row in rows]
      header = list(dict.fromkeys(key for row in laid_out for key in row))
      cells = [[row.get(key, "–") for key in header] for row in laid_out]
      found.append(report.Table(_words(name) + ".", header, cells))
  return found


def _cells(
    tree: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, str]]:
  """Yields name and text of every number, or number with its spread."""
  for name, value in tree.items():
    text = _text(value)
    if text is not None:
      yield prefix + _words(name), text
    elif isinstance(value, Mapping):
      yield from _cells(value, f"{prefix}{_words(name)}, ")
    elif prefix == "" and _is_rows(value) and "finding" not in tree:
      for i, row in enumerate(value):  # Rows within a row.
        yield from _cells(row, f"{_words(name)} {i}, ")


def _text(value: Any) -> str | None:
  """The text of a number, a number with its spread, or a few numbers."""
  if isinstance(value, Mapping):
    if value.keys() == {"mean", "std"}:
      if value["std"] is None:  # A single seed has none.
        return _text(value["mean"])
      return f"{_text(value['mean'])} ± {_text(value['std'])}"
    if value.keys() == {"mean", "low", "high"}:
      mean, low, high = (_text(value[name]) for name in ("mean", "low", "high"))
      return None if None in (mean, low, high) else f"{mean} [{low}, {high}]"
    return None
  if isinstance(value, list):
    # Longer lists are curves: they belong into the figure.
    is_short = len(value) <= 4 and not any(map(_is_nested, value))
    return ", ".join(str(_text(item)) for item in value) if is_short else None
  if isinstance(value, float):
    return f"{value:.4g}"
  return "–" if value is None else str(value)


def _is_nested(value: Any) -> bool:
  return isinstance(value, (list, Mapping))


def _is_rows(value: Any) -> bool:
  return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _words(name: str) -> str:
  return name.replace("_", " ")
