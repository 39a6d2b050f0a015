"""Draws what a step waits for by what may lie in the host's memory."""

from collections.abc import Mapping
import pathlib
from typing import Any

import numpy as np

from scansnap_jax.experiment import figures

Summary = Mapping[str, Any]
_PARTS = ("transfer", "memory", "arithmetic")


def draw(summary: Summary, folder: pathlib.Path) -> pathlib.Path:
  """Writes the figure of a plan; returns the path of offload.png.

  Args:
    summary: Of `plan.make`.
    folder: Where it goes.
  """
  rows = [row for row in summary["rows"] if row["fits"]]
  names = [row["way"] for row in rows]
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 1.2 + 0.45 * len(rows))
    times, speed = figure.subplots(1, 2, sharey=True)
    places, width = np.arange(len(rows)), 0.25
    for number, part in enumerate(_PARTS):
      ms = [1e3 * row["seconds"][part] for row in rows]
      times.barh(places + (number - 1) * width, ms, width, label=part)
    times.set(
        xlabel="ms a step, at the peaks",
        xscale="log",
        yticks=places,
        yticklabels=names,
    )
    times.invert_yaxis()
    speed.barh(places, [row["tokens_per_sec"] for row in rows], 0.5)
    speed.set(xlabel="tokens per second")
    figures.put_legend_above(figure, figures.legend_entries(times))
    return figures.save(figure, folder, "offload")[0]
