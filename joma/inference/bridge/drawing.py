"""The figure of `launch.bridge`: recall of heavy hitters along training."""

from collections.abc import Mapping
from typing import Any

from matplotlib import axes as mpl_axes
from matplotlib import figure as mpl_figure
from matplotlib import ticker as mpl_ticker
import numpy as np

from joma.inference.bridge import config as bridge_config
from joma.systems.cache_policies import names as policy_names
from scansnap_jax.experiment import figures
from scansnap_jax.experiment import intervals

_LABELS = {
    "theory": "co-occurrence theory",
    "discriminancy": "the same per occurrence",
    "frequency": "frequency",
    bridge_config.RUNNING_SUM: "{policy}, running sum",
    bridge_config.RUNNING_MEAN: "{policy}, running mean",
    "type": "best ranking by type",
    "recency": "recency",
    "random": "random",
}
TITLES = {
    "one_layer": "one layer, Scan & Snap data",
    "none": "Transformer on text, no positions",
    "rotary": "Transformer on text, rotary",
}
_LOOKS = {
    "theory": figures.CurveStyle("black", "o", "-"),
    "frequency": figures.CurveStyle("#E69F00", "D", (0, (5, 1.2))),
    bridge_config.RUNNING_SUM: figures.CurveStyle("#0072B2", "s", "-"),
    bridge_config.RUNNING_MEAN: figures.CurveStyle(
        "#56B4E9", "^", (0, (3, 1, 1, 1))
    ),
    "type": figures.CurveStyle("#009E73", "P", (0, (5, 1.2))),
    "recency": figures.CurveStyle("#CC79A7", "v", (0, (1, 1))),
}


def labels() -> dict[str, str]:
  """Names of the predictors, the policy by its paper's."""
  policy = policy_names.label(bridge_config.RUNNING_SUM)
  return {key: text.format(policy=policy) for key, text in _LABELS.items()}


def draw(panels: Mapping[str, Mapping[str, Any]]) -> mpl_figure.Figure:
  """Draws one panel a setting, means over runs with their 95 % interval.

  Args:
    panels: By a name of `TITLES`, what `bridge.along_training` gives.
  """
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 2.9)
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (name, panel) in zip(row, panels.items(), strict=True):
      _draw_panel(axes, panel)
      axes.set_title(TITLES[name])
    row[0].set_ylabel("recall of the heavy hitters")
    figures.put_legend_above(figure, figures.legend_entries(*row))
  return figure


def _draw_panel(axes: mpl_axes.Axes, panel: Mapping[str, Any]) -> None:
  steps = np.asarray(panel["steps"])
  for name, look in _LOOKS.items():
    curves = np.asarray(panel["recall"][name])
    found = intervals.interval(curves, least=0, most=1)
    every = figures.sparsely(len(steps), look)
    axes.plot(
        steps,
        found["mean"],
        **look._asdict(),
        markevery=every,
        label=labels()[name],
    )
    figures.shade(axes, steps, found["low"], found["high"], look)
  axes.axhline(
      panel["chance"],
      color="black",
      linestyle=":",
      linewidth=0.8,
      label="chance",
  )
  first = steps[1] if len(steps) > 1 else 1
  axes.set_xscale("symlog", linthresh=first, linscale=0.4)
  axes.set(xlim=(0, max(1, steps[-1])), ylim=(0, 1), xlabel="training step")
  axes.xaxis.set_major_locator(mpl_ticker.FixedLocator(_ticks(steps)))
  axes.xaxis.set_major_formatter("{x:g}")
  axes.xaxis.set_minor_locator(mpl_ticker.NullLocator())


def _ticks(steps: np.ndarray) -> list[int]:
  """The start, and the first measured step after each doubling."""
  ticks = [int(steps[0])]
  for step in steps[1:]:
    if step >= 2 * ticks[-1]:
      ticks.append(int(step))
  return ticks
