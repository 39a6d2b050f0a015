"""Figures of RULER's tasks: scores against budgets, and a needle's heat map.

They take rows of summary.json of `launch.evaluate_cache --tasks=ruler`; they
return a figure and write nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import figure as mpl_figure
from matplotlib import lines as mpl_lines
import numpy as np

from joma.inference.evaluation import drawing
from joma.inference.evaluation.protocols import leaderboard
from joma.systems.cache_policies import names as policy_names
from scansnap_jax.experiment import figures

Row = Mapping[str, Any]


def draw(board: leaderboard.Leaderboard) -> mpl_figure.Figure:
  """Draws the mean over tasks and each task by what is kept."""
  panels = [leaderboard.MEAN, *board.passed]
  with figures.style():
    figure, grid = figures.make_panels(len(panels), "score")
    for axes, task in zip(grid, panels, strict=True):
      _draw_curves(axes, board, task)
      axes.set_title("mean of tasks" if task == leaderboard.MEAN else task)
      axes.set_xlabel("kept, %")
      axes.set_xlim(0, 100)
      axes.set_ylim(-3, 103)
    entries = figures.legend_entries(grid[0])
    entries["full cache"] = mpl_lines.Line2D(
        [], [], color="black", linestyle=":", linewidth=0.8
    )
    figures.put_legend_above(figure, entries)
  return figure


def _draw_curves(axes: Any, board: leaderboard.Leaderboard, task: str) -> None:
  looks = drawing.looks([{"policy": name} for name in board.policies])
  for name, look in looks.items():
    budgets = board.budgets(name)
    parts = [board.scores[name, budget][task] for budget in budgets]
    x = 100 * np.array(budgets)
    of = {key: np.array([p[key] for p in parts]) for key in parts[0]}
    axes.plot(x, of["mean"], **look._asdict(), label=drawing.label(name))
    if task == leaderboard.MEAN:  # Those of single tasks cover each other.
      figures.shade(axes, x, of["low"], of["high"], look)
  full = board.scores[policy_names.REFERENCE, 1.0][task]["mean"]
  axes.axhline(full, color="black", linestyle=":", linewidth=0.8)


def draw_map(rows: Sequence[Row]) -> mpl_figure.Figure:
  """Draws the score of a needle by its depth and the text's length."""
  names = list(dict.fromkeys(row["policy"] for row in rows))
  depths = sorted({row["depth"] for row in rows})
  lengths = sorted({row["length"] for row in rows})
  with figures.style():
    figure, grid = figures.make_panels(len(names), "depth of the needle, %")
    for axes, name in zip(grid, names, strict=True):
      values = np.full((len(depths), len(lengths)), np.nan)
      for row in rows:
        if row["policy"] == name:
          place = depths.index(row["depth"]), lengths.index(row["length"])
          values[place] = 100 * np.mean(row["scores"])
      figures.draw_heat_map(axes, values, 100.0)
      for (row, column), value in np.ndenumerate(values):
        color = "white" if value > 55 else "black"  # The map darkens.
        style = dict(ha="center", va="center", fontsize=7, color=color)
        axes.text(column, row, f"{value:.0f}", **style)
      axes.set_title(drawing.label(name))
      axes.set_xticks(range(len(lengths)), [str(n) for n in lengths])
      axes.set_yticks(range(len(depths)), [f"{100 * d:g}" for d in depths])
      axes.set_xlabel("tokens")
    figure.colorbar(grid[0].images[0], ax=grid, label="score", shrink=0.8)
  return figure
