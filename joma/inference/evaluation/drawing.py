"""Figures of evaluated KV-cache policies: quality and recall against budgets.

They take rows of summary.json of `launch.evaluate_cache`, fresh or read back;
they return a figure and write nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib import axes as mpl_axes
from matplotlib import figure as mpl_figure
from matplotlib import lines as mpl_lines
from matplotlib import ticker as mpl_ticker
import numpy as np

from joma.systems.cache_policies import names as policy_names
from scansnap_jax.experiment import figures

Row = Mapping[str, Any]

_OTHERS = (
    figures.CurveStyle("#0072B2", "s", "-"),
    figures.CurveStyle("#009E73", "^", "-"),
    figures.CurveStyle("#CC79A7", "P", "-"),
    figures.CurveStyle("#56B4E9", "o", (0, (5, 1.2))),
    figures.CurveStyle("#0072B2", "s", (0, (3, 1, 1, 1))),
    figures.CurveStyle("#009E73", "^", (0, (1, 1))),
    figures.CurveStyle("#CC79A7", "P", (0, (5, 1.2))),
    figures.CurveStyle("#D55E00", "o", (0, (3, 1, 1, 1))),
)


def draw(rows: Sequence[Row]) -> mpl_figure.Figure:
  """Draws a task: quality by budget and by bytes, recall where there is any."""
  is_text = "perplexity" in rows[0]
  name = "perplexity" if is_text else "quality"
  title = "perplexity" if is_text else "accuracy"
  panels: list[tuple[str, str, Callable[[Row], float]]] = [
      (name, title, _percent),
      (name, title, _megabytes),
  ]
  if not is_text:
    panels.insert(1, ("recall", "gold tokens still kept", _percent))
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 2.9)
    grid = figure.subplots(1, len(panels))
    for axes, (key, ylabel, place) in zip(grid, panels, strict=True):
      _draw_curves(axes, rows, key, place)
      axes.set_ylabel(ylabel)
      _scale(axes, rows, key)
      drawn = [r for r in rows if r["policy"] != policy_names.REFERENCE]
      most = max(map(place, drawn or rows))
      if place is _percent:
        axes.set_xlabel("slots, % of the text")
      else:
        axes.set_xlabel("MB of cache that a step moves")
        if most < 0.1:
          axes.set_xlabel("KB of cache that a step moves")
          axes.xaxis.set_major_formatter(lambda x, _: f"{1000 * x:g}")
      axes.set_xlim(0, 1.05 * most)
      axes.xaxis.set_major_locator(
          mpl_ticker.MaxNLocator(5, steps=(1, 2, 5, 10))
      )
    entries = figures.legend_entries(grid[0])
    entries["full cache"] = mpl_lines.Line2D(
        [], [], color="black", linestyle=":", linewidth=0.8
    )
    figures.put_legend_above(figure, entries)
  return figure


def looks(rows: Sequence[Row]) -> dict[str, figures.CurveStyle]:
  """Gives each policy but full its look."""
  names = dict.fromkeys(row["policy"] for row in rows)
  names.pop(policy_names.REFERENCE, None)
  # A policy with a look of its own has it in every figure.
  own = {
      name: figures.CurveStyle(*look)
      for name in names
      if name in policy_names.POLICIES
      and (look := policy_names.load(name).look) is not None
  }
  free = (name for name in names if name not in own)
  others = {n: _OTHERS[i % len(_OTHERS)] for i, n in enumerate(free)}
  return others | {name: own[name] for name in names if name in own}


def label(name: str) -> str:
  """Writes the name of a policy as its paper does, its settings behind."""
  return policy_names.label(name)


def _draw_curves(
    axes: mpl_axes.Axes,
    rows: Sequence[Row],
    key: str,
    place: Callable[[Row], float],
) -> None:
  for name, look in looks(rows).items():
    mine = [row for row in rows if row["policy"] == name]
    x = np.array([place(row) for row in mine])
    parts = {
        part: np.array([row[key][part] for row in mine], float)
        for part in ("mean", "low", "high")
    }
    axes.plot(x, parts["mean"], **look._asdict(), label=label(name))
    figures.shade(axes, x, parts["low"], parts["high"], look)
  full = next(row for row in rows if row["policy"] == policy_names.REFERENCE)
  if not full.get("failed"):
    line = {"color": "black", "linestyle": ":", "linewidth": 0.8}
    axes.axhline(full[key]["mean"], **line)


def _scale(axes: mpl_axes.Axes, rows: Sequence[Row], key: str) -> None:
  if key != "perplexity":
    axes.set_ylim(0, 1.03)
    return
  means = [row[key]["mean"] for row in rows if not row.get("failed")]
  if max(means) > 4 * min(means):
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(mpl_ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(mpl_ticker.NullLocator())


def _percent(row: Row) -> float | int:
  return 100 * row["budget"]


def _megabytes(row: Row) -> float | int:
  return row["step_cache_bytes"] / 1e6
