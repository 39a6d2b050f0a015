"""The report of a plan: summary.json, figure and report.html."""

from collections.abc import Mapping
import pathlib
from typing import Any

from joma.scale import plan
from scansnap_jax.experiment import report

Summary = Mapping[str, Any]


def write(
    workdir: pathlib.Path, summary: Summary, facts: Mapping[str, str]
) -> pathlib.Path:
  """Writes everything; returns the path of report.html."""
  # Imported here: matplotlib is large, and a plan without a folder draws none.
  from joma.scale import drawing

  summary = report.write_summary(workdir, summary)
  png = drawing.draw(summary, workdir)
  asked = summary["question"]
  title = f"{asked['shape']}: {asked['task']} on {asked['topology']}"
  held = [
      report.Figure(
          "Left: what a device holds, against its HBM. Right: least time of"
          " arithmetic, HBM and interconnect, each at its peak. Read off"
          " compiled programs; nothing was measured.",
          png,
      ),
      bytes_table(summary),
      times_table(summary),
  ]
  sections = [
      report.Section("Finding", "\n\n".join(summary["finding"])),
      report.Section("Compiled meshes", items=held),
      report.Section(
          "Collectives",
          "Bytes are those of what is gathered, summed or sent, in one step on"
          " one device; sent is what a ring makes a device send of them.",
          [collectives_table(row) for row in summary["meshes"]],
      ),
      report.Section(
          "All meshes by estimate",
          "Estimates rank meshes; they are formulas, no compiler's figures.",
          [estimates_table(summary)],
      ),
  ]
  return report.write(workdir, title, facts, sections)


def bytes_table(summary: Summary) -> report.Table:
  """A column for each compiled mesh."""
  rows = summary["meshes"]
  kinds = list(dict.fromkeys(k for row in rows for k in row.get("bytes", {})))
  of = lambda row, kind: _gb(row.get("bytes", {}).get(kind))
  cells = [[kind, *(of(row, kind) for row in rows)] for kind in kinds]
  for name, key in (
      ("in all", "held_bytes"),
      ("HBM", "hbm_bytes"),
      ("in the host", "host_bytes"),
      ("activations, estimated", "activation_bytes"),
  ):
    cells.append([name, *(_gb(row.get(key)) for row in rows)])
  return report.Table(
      "GB on a device. Temporaries are the compiler's; activations are among"
      " them, and estimated by formula.",
      ["", *(plan.mesh_name(row["mesh"]) for row in rows)],
      cells,
  )


def times_table(summary: Summary) -> report.Table:
  """A row for each compiled mesh."""
  header = [
      *("mesh", "fits", "bound by", "ms at the bound", "compute ms"),
      *("HBM ms", "ICI ms", "DCN ms", "ms one by one", "TFLOP", "MFU"),
      "compiled in",
  ]
  return report.Table(
      "Least times of a step. MFU at the bound: FLOPs that the model needs over"
      " those that all devices could do in that time.",
      header,
      [_times_row(row) for row in summary["meshes"]],
  )


def _times_row(row: Summary) -> list[str]:
  name, compiled = (
      plan.mesh_name(row["mesh"]),
      f"{row['compile_seconds']:.0f} s",
  )
  if "seconds" not in row:
    return [name, "no", row["reason"], *("–",) * 8, compiled]
  ms = lambda seconds: f"{1e3 * seconds:.4g}"
  return [
      name,
      "yes" if row["fits"] else "no",
      row["bound"],
      ms(row["bound_seconds"]),
      *(
          ms(row["seconds"].get(name, 0))
          for name in ("compute", "HBM", "ICI", "DCN")
      ),
      ms(row["serial_seconds"]),
      f"{row['flops'] / 1e12:.4g}",
      f"{100 * row['mfu']:.3g} %",
      compiled,
  ]


def collectives_table(row: Summary) -> report.Table:
  """What devices exchange on one mesh."""
  return report.Table(
      plan.mesh_name(row["mesh"]),
      ["kind", "over", "times", "MB", "MB sent", "ICI ms", "DCN ms"],
      [
          [
              one["kind"],
              one["axes"],
              str(one["number"]),
              f"{one['bytes'] / 1e6:.4g}",
              f"{one['sent_bytes'] / 1e6:.4g}",
              f"{1e3 * one['seconds']:.4g}",
              f"{1e3 * one['dcn_seconds']:.4g}",
          ]
          for one in row.get("collectives", ())
      ],
  )


def estimates_table(summary: Summary) -> report.Table:
  """A row for each mesh that divides."""
  return report.Table(
      "All meshes that divide model and batch.",
      [
          *("mesh", "ms", "compute ms", "HBM ms", "ICI ms", "DCN ms"),
          *("GB held", "fits"),
      ],
      [
          [
              plan.mesh_name(one["mesh"]),
              *(
                  f"{1e3 * one[key]:.4g}"
                  for key in (
                      *("seconds", "compute_seconds"),
                      *("hbm_seconds", "ici_seconds", "dcn_seconds"),
                  )
              ),
              _gb(one["held_bytes"]),
              "yes" if one["fits"] else "no",
          ]
          for one in summary["estimates"]
      ],
  )


def _gb(number: int | float | None) -> str:
  return "–" if number is None else f"{number / 1e9:.4g}"
