"""The report of a scaling curve: summary.json, figure and report.html."""

from collections.abc import Mapping
import pathlib
from typing import Any

from scansnap_jax.experiment import report

Summary = Mapping[str, Any]


def write(
    workdir: pathlib.Path, summary: Summary, facts: Mapping[str, str]
) -> pathlib.Path:
  """Writes everything; returns the path of report.html."""
  # Imported here: matplotlib is large, and tables need none.
  from joma.scale.curve import drawing

  summary = report.write_summary(workdir, summary)
  asked = summary["question"]
  figure = report.Figure(
      "Left: least time of a step by what it goes over, each at its peak;"
      " filled marks are compiled programs, the others formulas. Right: what a"
      " chip does of its work on the fewest chips. Nothing was measured.",
      drawing.draw(summary, workdir),
  )
  title = f"{asked['shape']}: {asked['task']} on more and more {asked['chip']}"
  sections = [
      report.Section("Finding", "\n\n".join(summary["finding"])),
      report.Section("By number of chips", items=[figure, table(summary)]),
  ]
  return report.write(workdir, title, facts, sections)


def table(summary: Summary) -> report.Table:
  """A row for each number of chips."""
  header = [
      *("chips", "data x fsdp x tensor x seq", "from", "TFLOP", "GB HBM"),
      *("GB sent", "compute ms", "HBM ms", "ICI ms", "bound by"),
      *("MFU", "efficiency", "fits"),
  ]
  return report.Table(
      "Of one device and step. MFU at the bound: FLOPs that the model needs"
      " over those that all devices could do in that time. Efficiency: against"
      " the fewest chips.",
      header,
      [_row(row) for row in summary["rows"]],
  )


def _row(row: Summary) -> list[str]:
  return [
      str(row["num_chips"]),
      " x ".join(map(str, row["mesh"].values())),
      "program" if row["is_compiled"] else "formula",
      f"{row['flops'] / 1e12:.4g}",
      f"{row['hbm_bytes'] / 1e9:.4g}",
      f"{row['sent_bytes'] / 1e9:.4g}",
      *(f"{1e3 * seconds:.4g}" for seconds in row["seconds"].values()),
      row["bound"],
      f"{100 * row['mfu']:.3g} %",
      f"{100 * row['efficiency']:.3g} %",
      "yes" if row["fits"] else "no",
  ]
