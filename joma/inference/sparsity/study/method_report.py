"""Figure and table of methods and rules: perplexity against weights read."""

from collections.abc import Mapping
from typing import Any

from matplotlib import figure as mpl_figure
from matplotlib import ticker as mpl_ticker
import numpy as np

from scansnap_jax.experiment import figures
from scansnap_jax.experiment import report
from scansnap_jax.experiment.venues import edges

Summary = Mapping[str, Any]
# Of the figure: perplexities above so many times the dense one are not shown.
_HIGHEST = 2.0
_COLORS = (
    "#D55E00",
    "#0072B2",
    "#009E73",
    "#E69F00",
    "#CC79A7",
    "#56B4E9",
    "black",
    "#7A7A7A",
)
_MARKERS = "osD^vPX*<>ph"
_LINES = ("-", (0, (5, 1.2)), (0, (1, 1)), (0, (3, 1, 1, 1)))


def section(summary: Summary, figure: report.Figure) -> report.Section:
  """All methods in one figure and one table."""
  text = (
      "Methods share a budget of weights out evenly, within layers or over"
      " them, as calibrated on texts that nothing else was learned from. Codes"
      " of few bits count as the share that they are of 16. Change of"
      " perplexity with its 95 % interval over texts."
  )
  return report.Section(
      "Perplexity against weights read, all methods",
      text,
      [figure, _table(summary)],
  )


def draw(summary: Summary) -> mpl_figure.Figure:
  """Draws every rule and method whose MLP weights are known."""
  rows = [
      row
      for row in (*summary["rows"], *summary["methods"])
      if "mlp_weights" in row
  ]
  dense = summary["dense"]["perplexity"]
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 4.2)
    axes = figure.subplots()
    least = min([dense, *(row["perplexity"] for row in rows)])
    axes.set_ylim(least - 0.03 * dense, _HIGHEST * dense)
    for index, name in enumerate(dict.fromkeys(row["rule"] for row in rows)):
      look = figures.CurveStyle(
          _COLORS[index % len(_COLORS)],
          _MARKERS[index % len(_MARKERS)],
          _LINES[index // len(_COLORS) % len(_LINES)],
      )
      own = [row for row in rows if row["rule"] == name]
      own = sorted(own, key=lambda row: row["mlp_weights"])
      x = np.array([row["mlp_weights"] for row in own])
      y = np.array([row["perplexity"] for row in own])
      axes.plot(x, y, **look._asdict(), label=name)
      edges.mark_above(axes, x, y, look.color)
      low, high = (
          dense * (1 + np.array([row[f"change_{side}"] for row in own]))
          for side in ("low", "high")
      )
      figures.shade(axes, x, low, high, look)
    axes.axhline(dense, color="black", linewidth=0.6)
    axes.set(
        xlabel="MLP weights read",
        ylabel="perplexity",
        xlim=(0, 1.05),
    )
    axes.xaxis.set_major_formatter(mpl_ticker.PercentFormatter(1, decimals=0))
    figures.put_legend_above(figure, figures.legend_entries(axes))
  return figure


def caption(summary: Summary) -> str:
  """Says what the figure shows."""
  return (
      "Perplexity against the share of MLP weights that a token reads, what"
      " choosing takes included. Line: the dense model,"
      f" {summary['dense']['perplexity']:.4g}. Bands: 95 % confidence of the"
      f" change, over texts ({summary['num_eval_tokens']} tokens). Open"
      f" triangles at the upper edge: above {_HIGHEST:g} times the dense"
      " perplexity."
  )


def _table(summary: Summary) -> report.Table:
  percent = lambda x: f"{100 * x:+.1f} %"
  rows = [
      (
          row["rule"],
          f"{row['share']:g}",
          f"{100 * row['mlp_weights']:.1f} %",
          f"{100 * row['weights']:.1f} %",
          f"{row['perplexity']:.4g}",
          (
              f"{percent(row['change'])} ({percent(row['change_low'])} to"
              f" {percent(row['change_high'])})"
          ),
      )
      for row in summary["methods"]
  ]
  header = ("method", "budget", "MLP weights read", "all weights read")
  return report.Table(
      "Methods, by budget.", (*header, "perplexity", "change"), rows
  )
