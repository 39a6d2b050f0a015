"""The figure of JoMA's Table 1 (https://arxiv.org/abs/2310.00535).

It takes the summary of `joma.studies.table1`, as made or as read back from
JSON, returns a figure and writes nothing; `CAPTIONS` says what it shows.
"""

from collections.abc import Mapping
import types
from typing import Any

from matplotlib import axes as mpl_axes
from matplotlib import figure as mpl_figure
import numpy as np

from scansnap_jax.experiment import figures

CAPTIONS = types.MappingProxyType({
    "table1": (
        "Correlation of the latents of level s with their best hidden node in"
        " block s, mean and sample standard deviation over seeds. Above: on the"
        " classes, as in the paper, after and before training, and after"
        " training against latents shuffled over the classes. Below: on"
        " combinations of latents that no class has, of the best node there and"
        " of the node chosen on the classes, after and before training. Below"
        " each column: classes C, latents combined N_ch, latents of level 0"
        " and 1."
    )
})

# Rows of the figure: title, and name of each score with its legend.
_ROWS = (
    (
        "on the classes",
        {
            "trained": "trained",
            "untrained": "untrained",
            "shuffled": "trained, shuffled latents",
        },
    ),
    (
        "on unseen combinations",
        {
            "unseen": "best node, trained",
            "untrained_unseen": "best node, untrained",
            "transferred": "node of the classes, trained",
            "untrained_transferred": "node of the classes, untrained",
        },
    ),
)
_LOOKS = {
    "trained": figures.CurveStyle("#0072B2", "o", ""),
    "untrained": figures.CurveStyle("#7A7A7A", "v", ""),
    "shuffled": figures.CurveStyle("#D55E00", "s", ""),
    "unseen": figures.CurveStyle("#0072B2", "D", ""),
    "untrained_unseen": figures.CurveStyle("#7A7A7A", "d", ""),
    "transferred": figures.CurveStyle("#009E73", "P", ""),
    "untrained_transferred": figures.CurveStyle("#E69F00", "X", ""),
}


def table1(summary: Mapping[str, Any]) -> mpl_figure.Figure:
  """Draws the scores of both levels beside their floors, one column a cell."""
  cells = summary["cells"]
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 5.6)
    parts = figure.subfigures(
        2, 1, squeeze=False, height_ratios=(1, 1.25)
    ).ravel()
    for part, (title, names) in zip(parts, _ROWS, strict=True):
      panels = part.subplots(1, 2, sharey=True)
      for level, axes in enumerate(panels):
        _draw(axes, [cell["levels"][level] for cell in cells], names)
        axes.set_title(f"level {level}, {title}")
        axes.set_xticks(range(len(cells)), [])
      panels[0].set_ylabel("correlation")
      figures.put_legend_above(part, figures.legend_entries(panels[0]))
    labels = [_label(cell) for cell in cells]
    for axes in parts[-1].axes:
      axes.set_xticks(range(len(cells)), labels, rotation=90)
      axes.set_xlabel("$C$, $N_{ch}$, latents of level 0 + 1")
  return figure


def _draw(
    axes: mpl_axes.Axes,
    levels: list[Mapping[str, Any]],
    names: Mapping[str, str],
) -> None:
  """Draws one panel; points of a cell are set apart sideways."""
  for i, (name, label) in enumerate(names.items()):
    mean, spread = (
        np.array([level[name][kind] for level in levels])
        for kind in ("mean", "std")
    )
    x = np.arange(len(levels)) + 0.15 * (i - (len(names) - 1) / 2)
    figures.draw_points(axes, x, mean, spread, _LOOKS[name], label)
  axes.grid(False, axis="x")
  axes.set(xlim=(-0.7, len(levels) - 0.3))


def _label(cell: Mapping[str, Any]) -> str:
  latents = "+".join(map(str, cell["num_latents"]))
  return f"{cell['num_classes']}, {cell['num_combinations']}, {latents}"
