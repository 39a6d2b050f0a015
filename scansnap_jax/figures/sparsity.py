"""Figures 6, 11 and 12 of Scan & Snap (https://arxiv.org/abs/2305.16380).

What attention keeps after training, against learning rates. The functions take
the results of `train.train_and_evaluate`, return a figure and write nothing;
`CAPTIONS` says what each shows.

Letters as in `scansnap_jax`.
"""

from collections.abc import Mapping, Sequence
import types

import jax
import jax.numpy as jnp
from matplotlib import axes as mpl_axes
from matplotlib import figure as mpl_figure
import numpy as np

from scansnap_jax import metrics
from scansnap_jax import published
from scansnap_jax import train
from scansnap_jax.experiment import figures

# Thresholds of Figures 11 and 12 by number of tokens, all near 1/M.
_THRESHOLDS = types.MappingProxyType({
    33: (0.028, 0.038),
    79: (0.012, 0.016),
    125: (0.0075, 0.0105),
    240: (0.0040, 0.0050),
})

_RECALL = (
    "Fraction of a class's distinct tokens with attention c_{l|n} above a"
    " threshold near 1/M, mean over classes, after training; mean and sample"
    " standard deviation over seeds,"
)

CAPTIONS = types.MappingProxyType({
    "figure6": (
        "Entropy of attention over distinct tokens after training, mean and"
        " sample standard deviation over seeds, against η_Y/η_Z. Open markers:"
        " the authors' runs (10 seeds), where known. Points of one ratio are"
        " set apart sideways."
    ),
    "figure11": f"{_RECALL} for several η_Z.",
    "figure12": f"{_RECALL} for several η_Y/η_Z.",
})


def figure6(
    results: Sequence[train.Result], *, show_published: bool = True
) -> mpl_figure.Figure:
  """Draws the final distinct-token entropy against eta_Y / eta_Z.

  Args:
    results: One result per panel.
    show_published: Whether to draw the authors' points, which are those of
      Syn-Medium.

  Returns:
    The figure.
  """
  looks = _looks(results, "lr_z")
  with figures.style():
    figure, panels = figures.make_panels(
        len(results), "distinct-token entropy (nats)"
    )
    known = [
        _draw_entropy(axes, result, looks, show_published)
        for axes, result in zip(panels, results, strict=True)
    ]
    entries = figures.legend_entries(*panels)
    if any(known):
      entries["authors"] = figures.known_entry()
    figures.put_legend_above(figure, entries)
  return figure


def figure11(results: Sequence[train.Result]) -> mpl_figure.Figure:
  """Draws recall of distinct tokens by eta_Z, at the smallest eta_Y / eta_Z."""
  return _draw_recall(results, "lr_z", "lr_ratio", r"\eta_Z")


def figure12(results: Sequence[train.Result]) -> mpl_figure.Figure:
  """Draws recall of distinct tokens by eta_Y / eta_Z.

  At eta_Z = 1, or at the smallest eta_Z where no run has that.
  """
  return _draw_recall(results, "lr_ratio", "lr_z", r"\eta_Y/\eta_Z")


def _looks(
    results: Sequence[train.Result], axis: str
) -> dict[float, figures.CurveStyle]:
  """Gives each value of a sweep axis its look, in increasing order."""
  values = np.concatenate([getattr(r.runs, axis) for r in results])
  return figures.curve_styles(np.unique(values).tolist())


def _title(axes: mpl_axes.Axes, result: train.Result) -> None:
  """Names a data setting by its numbers of queries, classes and tokens."""
  classes = result.classes
  num_last = len(np.unique(classes.query))
  queries = "query" if num_last == 1 else "queries"
  axes.set_title(
      f"{num_last} {queries}, $K={classes.num_classes}$,"
      f" $M={classes.num_tokens}$"
  )


def _draw_entropy(
    axes: mpl_axes.Axes,
    result: train.Result,
    looks: Mapping[float, figures.CurveStyle],
    show_published: bool,
) -> bool:
  """Draws one panel of Figure 6; tells whether published points are in it."""
  any_known = False
  for i, (lr_z, look) in enumerate(looks.items()):
    # Sideways by factors, as the axis is logarithmic.
    shift = 1.08 ** (i - (len(looks) - 1) / 2)
    ratios, mean, std = _entropy_points(result, lr_z)
    label = rf"$\eta_Z={lr_z:g}$"
    figures.draw_points(axes, ratios * shift, mean, std, look, label)
    ratios, mean, std = _published_points(result, lr_z)
    if show_published and ratios.size:
      figures.draw_known_points(axes, ratios * shift * 1.04, mean, std, look)
      any_known = True
  ratios = np.unique(result.runs.lr_ratio)
  limits = (ratios[0] / 1.3, ratios[-1] * 1.3)
  axes.set(xlabel=r"$\eta_Y/\eta_Z$", xscale="log", xlim=limits)
  axes.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
  axes.set_xticks([], minor=True)
  _title(axes, result)
  return any_known


def _entropy_points(result: train.Result, lr_z: float) -> np.ndarray:
  """Lists eta_Y / eta_Z, mean and sample std over seeds, each [S]."""
  points = []
  for ratio in np.unique(result.runs.lr_ratio):
    own = (result.runs.lr_z == lr_z) & (result.runs.lr_ratio == ratio)
    final = result.history.distinct_entropy[own, -1].astype(np.float64)
    if len(final):
      spread = final.std(ddof=1) if len(final) > 1 else 0
      points.append((ratio, final.mean(), spread))
  return np.reshape(points, (-1, 3)).T


def _published_points(result: train.Result, lr_z: float) -> np.ndarray:
  """Lists what the authors found, as `_entropy_points` does."""
  cells = [
      published.figure6_cell(
          result.num_last, result.classes.num_classes, lr_z, float(ratio)
      )
      for ratio in np.unique(result.runs.lr_ratio)
  ]
  points = [(c.lr_ratio, c.mean, c.std) for c in cells if c is not None]
  return np.reshape(points, (-1, 3)).T


def _draw_recall(
    results: Sequence[train.Result], axis: str, fixed: str, symbol: str
) -> mpl_figure.Figure:
  """Draws recall against threshold, one panel a result, one curve a rate."""
  looks = _looks(results, axis)
  with figures.style():
    figure, panels = figures.make_panels(
        len(results), "recall of distinct tokens"
    )
    for axes, result in zip(panels, results, strict=True):
      _title(axes, result)
      others = getattr(result.runs, fixed)
      # The paper's panels hold the other rate at 1.
      other = 1.0 if 1.0 in others else others.min()
      thresholds = _thresholds(result.classes.num_tokens)
      for value, look in looks.items():
        own = (getattr(result.runs, axis) == value) & (others == other)
        if own.any():
          recall = _recall(result, own, thresholds)
          label = f"${symbol}={value:g}$"
          figures.draw_band(
              axes, thresholds, recall, look, label, least=0, most=1
          )
      axes.set(
          xlabel="threshold on $c_{l|n}$",
          xlim=(thresholds[0], thresholds[-1]),
      )
      axes.locator_params(axis="x", nbins=5)
    entries = figures.legend_entries(*panels)
    figures.put_legend_above(figure, entries)
  return figure


def _thresholds(num_tokens: int) -> np.ndarray:
  """Spans the thresholds of the paper, or of settings that it lacks."""
  near = (0.92 / num_tokens, 1.25 / num_tokens)
  return np.linspace(*_THRESHOLDS.get(num_tokens, near), 61, dtype=np.float32)


def _recall(
    result: train.Result, own: np.ndarray, thresholds: np.ndarray
) -> np.ndarray:
  """Computes recall after training, [R, S]."""
  recall = jax.vmap(metrics.distinct_recall, in_axes=(0, None, None))
  return np.asarray(
      recall(
          jnp.asarray(result.history.attended[own, -1]),
          jnp.asarray(result.classes.is_distinct),
          jnp.asarray(thresholds),
      )
  )
