"""Draws what a plan's meshes hold and how long their steps take."""

from collections.abc import Mapping
import pathlib
from typing import Any

import numpy as np

from joma.scale import plan
from scansnap_jax.experiment import figures

Summary = Mapping[str, Any]

_SEEN = 2e-3  # Share of a bar that is a line's width.


def draw(summary: Summary, folder: pathlib.Path) -> pathlib.Path:
  """Writes the figure of a plan; returns the path of plan.png.

  Args:
    summary: Of `plan.make`.
    folder: Where it goes.
  """
  rows = summary["meshes"]
  names = [plan.mesh_name(row["mesh"]).replace(" x ", "\n") for row in rows]
  with figures.style():
    height = 1.6 + 0.6 * len(rows)
    figure = figures.make_figure(figures.PAGE_WIDTH, height)
    panels: Any = figure.subfigures(1, 2)
    draws = (_draw_bytes, _draw_times)
    for panel, draw_panel in zip(panels, draws, strict=True):
      axes = panel.subplots()
      draw_panel(axes, rows, names)
      figures.put_legend_above(panel, figures.legend_entries(axes))
    return figures.save(figure, folder, "plan")[0]


def _draw_bytes(axes: Any, rows: Any, names: list[str]) -> None:
  places = np.arange(len(rows))
  kinds = list(dict.fromkeys(k for row in rows for k in row.get("bytes", {})))
  left = np.zeros(len(rows))
  parts = {
      kind: np.array([row.get("bytes", {}).get(kind, 0) for row in rows]) / 1e9
      for kind in kinds
  }
  least = _SEEN * sum(parts.values(), np.zeros(len(rows))).max()
  for kind, size in parts.items():
    # What nobody would see has no place in the legend; the table has it.
    label = kind if size.max() > least else None
    axes.barh(places, size, left=left, label=label)
    left += size
  room = [row["hbm_bytes"] / 1e9 for row in rows if "hbm_bytes" in row]
  if room:
    axes.axvline(room[0], color="black", linestyle="--", label="HBM")
  axes.set(xlabel="GB a device", yticks=places, yticklabels=names)
  axes.invert_yaxis()


def _draw_times(axes: Any, rows: Any, names: list[str]) -> None:
  names_of = lambda row: row.get("seconds", ("compute", "HBM", "ICI"))
  kinds = list(dict.fromkeys(name for row in rows for name in names_of(row)))
  width = 0.75 / len(kinds)
  for number, name in enumerate(kinds):
    places = np.arange(len(rows)) + (number - (len(kinds) - 1) / 2) * width
    seconds = [1e3 * row.get("seconds", {}).get(name, 0) for row in rows]
    axes.barh(places, seconds, width, label=name)
  axes.set(
      xlabel="ms a step, at the peaks",
      yticks=np.arange(len(rows)),
      yticklabels=names,
  )
  axes.invert_yaxis()
