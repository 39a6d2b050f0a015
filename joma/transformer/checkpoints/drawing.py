"""Figures of inspected models, as Figure 7 of JoMA (arXiv 2310.00535) has them.

They take entries of summary.json of `launch.inspect_lm`, fresh or read back;
they return a figure and write nothing. `CAPTIONS` says what each shows.

Letters: L layers, N heads.
"""

from collections.abc import Mapping, Sequence
import re
import types
from typing import Any

import matplotlib
from matplotlib import axes as mpl_axes
from matplotlib import cm as mpl_cm
from matplotlib import colors as mpl_colors
from matplotlib import figure as mpl_figure
from matplotlib import lines as mpl_lines
from matplotlib import ticker as mpl_ticker
import numpy as np

from scansnap_jax.experiment import figures

Model = Mapping[str, Any]

CAPTIONS = types.MappingProxyType({
    "heads": (
        "Attention of every head, mean over queries: entropy; number of keys"
        " that it is spread over, exp(entropy); attention on the best fifth of"
        " the visible keys; attention on the first token. A row is a layer, the"
        " lowest on top; a column is a head."
    ),
    "layers": (
        "By layer, or by depth from the first (0) to the last (1) where models"
        " have not as many: attention entropy; attention on the best fifth of"
        " the visible keys; attention on the first token: mean over heads, and"
        " a band of one standard deviation between heads. Stable rank ‖W‖²_F /"
        " ‖W‖²_2 of the lower MLP matrices. Dotted: attention to all visible"
        " keys alike."
    ),
    "series": (
        "Along a series of checkpoints, one curve a layer: attention entropy,"
        " attention on the best fifth of the visible keys, attention on the"
        " first token, all mean over heads; stable rank of the lower MLP"
        " matrices; and the loss on the text."
    ),
})

_MEASURES = {
    "entropy": "entropy (nats)",
    "effective_support": "effective support (keys)",
    "top_mass": "mass of the best 20 %",
    "sink_mass": "mass of the first token",
}
_ALONG_DEPTH = ("entropy", "top_mass", "sink_mass")
_LOWER = {"gate": (0, (5, 1.2)), "up": "-"}
_MOST_CURVES = 6


def heads(model: Model) -> mpl_figure.Figure:
  """Draws the four measures of every head, layers by heads."""
  num_layers, num_heads = np.shape(model["entropy"])
  height = 0.75 + min(max(0.11 * num_layers, 0.8), 3.6)
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, height)
    panels = figure.subplots(1, 4, sharey=True)
    for axes, (name, title) in zip(panels, _MEASURES.items(), strict=True):
      values = np.array(model[name], float)
      limit = 1.0 if name.endswith("mass") else float(values.max())
      image = figures.draw_heat_map(axes, values, limit)
      bar = figure.colorbar(image, ax=axes, location="bottom", aspect=14)
      bar.set_label(title)
      bar.locator = mpl_ticker.LinearLocator(3)
      bar.formatter = mpl_ticker.FormatStrFormatter("%.3g")
      axes.xaxis.set_major_locator(_whole_numbers(num_heads))
      axes.yaxis.set_major_locator(_whole_numbers(num_layers))
      axes.set_xlabel("head")
    panels[0].set_ylabel("layer")
  return figure


def layers(models: Sequence[Model]) -> mpl_figure.Figure:
  """Draws each model's measures by depth; of more than six, six."""
  models = _spread(models, _MOST_CURVES)
  in_layers = len({len(model["entropy"]) for model in models}) == 1
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 4.4)
    panels = figure.subplots(2, 2).ravel()
    looks = figures.curve_styles(map(float, range(2, 2 + len(models))))
    for model, look in zip(models, looks.values(), strict=True):
      look = look._replace(linestyle="-")
      for axes, name in zip(panels, _ALONG_DEPTH, strict=False):
        values = np.array(model[name], float)
        x = _depth(values, in_layers)
        label = figures.as_is(model["name"])
        most = 1 if name.endswith("mass") else np.inf
        ends = {"least": 0, "most": most}
        figures.draw_band(axes, x, values.T, look, label, **ends)
      for name, line in _LOWER.items():
        if name in model["stable_rank"]:
          ranks = np.array(model["stable_rank"][name], float)
          every = figures.sparsely(len(ranks), look)
          axes = panels[3]
          style = look._replace(linestyle=line)._asdict()
          x = _depth(ranks, in_layers)
          axes.plot(x, ranks, **style, markevery=every)
    _draw_uniform(panels, models, in_layers)
    for axes, name in zip(panels, _ALONG_DEPTH, strict=False):
      axes.set_ylabel(_MEASURES[name])
      _start_at_zero(axes, name)
    panels[3].set(ylabel="stable rank of lower MLP")
    _start_at_zero(panels[3])
    for axes in panels:
      axes.margins(x=0.02)
      if in_layers:
        axes.xaxis.set_major_locator(_whole_numbers(len(models[0]["entropy"])))
    for axes in panels[2:]:
      axes.set_xlabel("layer" if in_layers else "depth")
    entries = figures.legend_entries(panels[0])
    line = lambda style: mpl_lines.Line2D(
        [], [], color="black", linestyle=style, linewidth=0.8
    )
    entries["uniform attention"] = line(":")
    if any("gate" in model["stable_rank"] for model in models):
      for name, style in _LOWER.items():
        entries[f"$W_{{{name}}}$"] = line(style)
    figures.put_legend_above(figure, entries)
  return figure


def series(models: Sequence[Model]) -> mpl_figure.Figure:
  """Draws measures along checkpoints of one shape, a curve a layer."""
  steps, label = checkpoint_steps([model["name"] for model in models])
  num_layers = len(models[0]["entropy"])
  colors = matplotlib.colormaps["viridis_r"].resampled(256)
  norm = mpl_colors.Normalize(-0.1 * num_layers, num_layers - 1)
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 4.4)
    grid = figure.subplots(2, 3)
    curves = {
        name: np.array([np.mean(m[name], axis=1) for m in models])
        for name in _ALONG_DEPTH
    }
    for name in ("up", "gate"):
      if name in models[0]["stable_rank"]:
        title = f"stable rank of W$_{{{name}}}$"
        curves[title] = np.array([m["stable_rank"][name] for m in models])
    panels = grid.ravel()
    for axes, (name, values) in zip(panels, curves.items(), strict=False):
      for layer in range(num_layers):
        color = colors(norm(layer))
        axes.plot(steps, values[:, layer], color=color, marker="o", ms=2)
      axes.set_ylabel(_MEASURES.get(name, name))
      _start_at_zero(axes, name)
    last = panels[len(curves)]
    if all(model["loss"] is not None for model in models):
      losses = [model["loss"] for model in models]
      last.plot(steps, losses, color="black", marker="o", ms=2)
      last.set_ylabel("loss (nats per token)")
    else:
      last.remove()
    for axes in panels[len(curves) + 1 :]:
      axes.remove()
    for axes in figure.axes:
      axes.set_xlabel(label)
      _scale_steps(axes, steps)
    if num_layers > 1:
      shown = mpl_colors.ListedColormap(
          [colors(norm(layer)) for layer in range(num_layers)]
      )
      scale = mpl_colors.Normalize(-0.5, num_layers - 0.5)
      bar = figure.colorbar(
          mpl_cm.ScalarMappable(scale, shown),
          ax=figure.axes,
          aspect=40,
          label="layer",
      )
      bar.ax.yaxis.set_major_locator(_whole_numbers(num_layers))
  return figure


def is_series(models: Sequence[Model]) -> bool:
  """Whether models are of one shape, and more than one."""
  shapes = {
      (np.shape(m["entropy"]), tuple(sorted(m["stable_rank"]))) for m in models
  }
  return len(models) > 1 and len(shapes) == 1


def checkpoint_steps(names: Sequence[str]) -> tuple[list[int], str]:
  """Training steps that names end in and their label, or plain numbers."""
  found = [re.search(r"(\d+)$", name) for name in names]
  steps = [int(match[1]) for match in found if match]
  if len(steps) == len(names) and steps == sorted(set(steps)):
    return steps, "training step"
  return list(range(len(names))), "checkpoint"


def _scale_steps(axes: mpl_axes.Axes, steps: Sequence[int]) -> None:
  """Logarithmic where steps grow so; a step 0 keeps its place."""
  first, last = sorted({0, *steps})[1], max(steps)
  if last <= 20 * first:
    axes.xaxis.set_major_locator(_whole_numbers(last + 1))
    return
  if 0 in steps:
    axes.set_xscale("symlog", linthresh=first, linscale=0.5)
    axes.set_xlim(-0.1 * first, 1.3 * last)
  else:
    axes.set_xscale("log")
  powers = np.arange(np.ceil(np.log10(first)), np.log10(last) + 0.01)
  ticks = 10 ** powers[:: -(-len(powers) // 4)]
  axes.set_xticks([0, *ticks] if 0 in steps else ticks)
  axes.xaxis.set_minor_locator(mpl_ticker.NullLocator())


def _draw_uniform(
    panels: Sequence[mpl_axes.Axes] | np.ndarray,
    models: Sequence[Model],
    in_layers: bool,
) -> None:
  drawn = set()
  for model in models:
    for axes, name in zip(panels, _ALONG_DEPTH, strict=False):
      values = np.array(model["uniform"][name], float)
      key = (name, tuple(values.round(6).tolist()))
      if key not in drawn:
        drawn.add(key)
        line = {"color": "black", "linestyle": ":", "linewidth": 0.8}
        axes.plot(_depth(values, in_layers), values, **line)


def _depth(values: np.ndarray, in_layers: bool) -> np.ndarray:
  """Where each layer stands: its number, or its depth from 0 to 1."""
  last = len(values) - 1 if in_layers else 1
  return np.linspace(0, last, len(values))


def _start_at_zero(axes: mpl_axes.Axes, name: str = "") -> None:
  """From 0 to above the highest marker, or to 1 of a mass."""
  highest = 1.04 * axes.get_ylim()[1]
  axes.set_ylim(0, 1.02 if name.endswith("mass") else highest)


def _spread(models: Sequence[Model], count: int) -> list[Model]:
  places = np.linspace(0, len(models) - 1, min(count, len(models)))
  return [models[place] for place in places.round().astype(int)]


def _whole_numbers(count: int) -> mpl_ticker.Locator:
  most = 7 if count > 8 else count
  return mpl_ticker.MaxNLocator(most, integer=True, min_n_ticks=1)
