"""Draws the least time of a step, and what a chip does, by number of chips."""

from collections.abc import Mapping
import pathlib
from typing import Any

import numpy as np

from scansnap_jax.experiment import figures

Summary = Mapping[str, Any]


def draw(summary: Summary, folder: pathlib.Path) -> pathlib.Path:
  """Writes the figure of a curve; returns the path of scaling.png.

  Args:
    summary: Of `scaling.make`.
    folder: Where it goes.
  """
  rows = summary["rows"]
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 2.6)
    times, shares = figure.subplots(1, 2)
    _draw_times(times, rows)
    _draw_shares(shares, rows)
    return figures.save(figure, folder, "scaling")[0]


def _draw_times(axes: Any, rows: Any) -> None:
  chips = np.array([row["num_chips"] for row in rows])
  compiled = np.array([row["is_compiled"] for row in rows])
  for name in ("compute", "HBM", "ICI"):
    ms = 1e3 * np.array([row["seconds"][name] for row in rows])
    (line,) = axes.plot(chips, ms, label=name)
    options = dict(color=line.get_color(), linestyle="", marker="o")
    axes.plot(chips[compiled], ms[compiled], **options)
    axes.plot(chips[~compiled], ms[~compiled], fillstyle="none", **options)
  axes.set(xlabel="chips", ylabel="ms a step, at the peaks")
  axes.set_xscale("log", base=2)
  axes.set_yscale("log")
  axes.legend()


def _draw_shares(axes: Any, rows: Any) -> None:
  chips = [row["num_chips"] for row in rows]
  for name, label in (("efficiency", "of the fewest chips"), ("mfu", "MFU")):
    axes.plot(chips, [100 * row[name] for row in rows], "o-", label=label)
  axes.set(xlabel="chips", ylabel="%", ylim=(0, 105))
  axes.set_xscale("log", base=2)
  axes.legend()
