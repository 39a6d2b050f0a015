"""The report of a plan of one chip and its host."""

from collections.abc import Mapping
import pathlib
from typing import Any

from scansnap_jax.experiment import report

Summary = Mapping[str, Any]
_HEADER = (
    *("may lie in the host", "batch", "weights of layers"),
    *("caches of layers", "stream", "GB chip", "GB host"),
    *("transfer ms", "HBM ms", "arithmetic ms", "bound by", "tokens/s"),
)


def write(
    workdir: pathlib.Path, summary: Summary, facts: Mapping[str, str]
) -> pathlib.Path:
  """Writes summary.json, figure and report.html; returns the last's path."""
  # Imported here: matplotlib is large, and tables need none.
  from joma.scale.offload import drawing

  summary = report.write_summary(workdir, summary)
  asked = summary["question"]
  items = [table(summary)]
  if any(row["fits"] for row in summary["rows"]):
    figure = report.Figure(
        "Least time of a step by what it goes over, each at its peak, and the"
        " tokens per second that the slowest leaves. Formulas: nothing was"
        " measured.",
        drawing.draw(summary, workdir),
    )
    items = [figure, *items]
  title = f"{asked['shape']} on {asked['chip']} and its host"
  sections = [
      report.Section("Finding", "\n\n".join(summary["finding"])),
      report.Section("Placements", items=items),
  ]
  return report.write(workdir, title, facts, sections)


def table(summary: Summary) -> report.Table:
  """A row for each way."""
  return report.Table(
      "Best placement by what may lie in the host's memory, and how much of it"
      f" does, of {summary['num_layers']} layers.",
      _HEADER,
      [_row(row) for row in summary["rows"]],
  )


def _row(row: Summary) -> list[str]:
  if not row["fits"]:
    return [row["way"], "does not fit", *("–",) * (len(_HEADER) - 2)]
  return [
      row["way"],
      str(row["batch_size"]),
      str(row["host_weights"]),
      str(row["host_cache"]),
      "yes" if row["host_stream"] else "no",
      *(f"{row[name]:.4g}" for name in ("device_gb", "host_gb")),
      *(f"{1e3 * seconds:.4g}" for seconds in row["seconds"].values()),
      row["bound"],
      f"{row['tokens_per_sec']:.4g}",
  ]
