"""The figures of Scan & Snap (https://arxiv.org/abs/2305.16380).

One function per figure of trained runs, named after it (Figures 3, 8 and 9 are
in `plot_theory`). They take the results of `train.train_and_evaluate`, return a
figure and write nothing; `CAPTIONS` says what each shows.

Letters: R runs, K classes, M tokens, N points of a curve.
"""

from collections.abc import Mapping, Sequence
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from matplotlib import axes as mpl_axes
from matplotlib import figure as mpl_figure
import numpy as np

from scansnap_jax import data
from scansnap_jax import metrics
from scansnap_jax import published
from scansnap_jax import run as run_lib
from scansnap_jax import train
from scansnap_jax.experiment import figures

# eta_Y / eta_Z -> (steps, distinct entropy, common mass), each [N].
Flow = Mapping[float, tuple[np.ndarray, np.ndarray, np.ndarray]]

# The iterations of Figures 4 and 5; the last one is added.
_SHOWN_STEPS = (0, 2, 4, 6, 8, 10)
_SETTINGS_PER_ROW = 3

# Thresholds of Figures 11 and 12 by number of tokens, all near 1/M.
_THRESHOLDS = types.MappingProxyType({
    33: (0.028, 0.038),
    79: (0.012, 0.016),
    125: (0.0075, 0.0105),
    240: (0.0040, 0.0050),
})

_HEAT_MAPS = (
    "Attention c_n of the first two classes, one column per iteration, on"
    " common tokens and on the distinct tokens of each class (rarest first);"
    " hatched: tokens that the class never draws. One run, that of the smallest"
    " seed. Below: batch loss (mean and range over seeds), entropy of attention"
    " over distinct tokens and attention on common tokens (mean and sample"
    " standard deviation over seeds)"
)
_RECALL = (
    "Fraction of a class's distinct tokens with attention c_{l|n} above a"
    " threshold near 1/M, mean over classes, after training; mean and sample"
    " standard deviation over seeds,"
)

CAPTIONS = types.MappingProxyType({
    "figure4": (
        _HEAT_MAPS
        + ". Dotted black: gradient flow with the same rates and momentum for"
        " infinitely long sequences. Open circles: the authors' losses"
        " (seed 2)."
    ),
    "figure5": _HEAT_MAPS + ", under Adam.",
    "figure6": (
        "Entropy of attention over distinct tokens after training, mean and"
        " sample standard deviation over seeds, against η_Y/η_Z. Open markers:"
        " the authors' runs (10 seeds), where known. Points of one ratio are"
        " set apart sideways."
    ),
    "figure11": f"{_RECALL} for several η_Z.",
    "figure12": f"{_RECALL} for several η_Y/η_Z.",
})


def figure4(
    result: train.Result,
    flow: Flow | None = None,
    *,
    show_published: bool = True,
) -> mpl_figure.Figure:
  """Draws attention along training, with loss and sparsity.

  Args:
    result: Runs of one data setting, at one or more pairs of learning rates.
    flow: What gradient flow predicts for infinitely long sequences, over the
      same steps; drawn over the runs.
    show_published: Whether to draw the authors' losses at eta_Y = eta_Z = 1,
      which are those of Syn-Small under SGD.

  Returns:
    The figure.
  """
  settings = _settings(result.runs)
  history = result.history
  with figures.style():
    heights = (3.45 * -(-len(settings) // _SETTINGS_PER_ROW), 2.15)
    figure = figures.make_figure(figures.PAGE_WIDTH, sum(heights))
    (top,), (bottom,) = figure.subfigures(
        2, 1, squeeze=False, height_ratios=heights
    )
    _draw_attention(top, result, settings)
    loss, entropy, mass = bottom.subplots(1, 3)
    for setting in settings:
      _draw_losses(loss, history.losses[setting.runs], setting)
      _draw_sparsity(entropy, result, history.distinct_entropy, setting)
      _draw_sparsity(mass, result, history.common_mass, setting)
    for ratio, (steps, *curves) in (flow or {}).items():
      if ratio in {setting.lr_ratio for setting in settings}:
        for axes, curve in zip((entropy, mass), curves, strict=True):
          axes.plot(steps, curve, "k:", label="gradient flow")
    loss.set(title="batch loss", ylabel="nats", yscale="log")
    entropy.set(title="entropy over distinct tokens", ylabel="nats")
    mass.set(title="attention on common tokens", ylim=(0, None))
    for axes in (loss, entropy, mass):
      axes.set(xlabel="step", xlim=(0, result.steps[-1]))
    entries = figures.legend_entries(loss, entropy)
    is_published = result.classes.num_tokens == published.FIGURE4_NUM_TOKENS
    is_published &= any(s.lr_z == s.lr_ratio == 1 for s in settings)
    if show_published and is_published:
      steps, losses = np.array([*published.FIGURE4_LOSSES.items()]).T
      figures.draw_known_points(loss, steps, losses)
      entries["authors, seed 2"] = figures.known_entry()
    figures.put_legend_above(bottom, entries)
  return figure


def figure5(
    result: train.Result, flow: Flow | None = None
) -> mpl_figure.Figure:
  """Draws what `figure4` does, without the authors' losses, which are SGD's."""
  return figure4(result, flow, show_published=False)


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


class _Setting(NamedTuple):
  """A pair of learning rates.

  Attributes:
    lr_z: eta_Z.
    lr_ratio: eta_Y / eta_Z.
    runs: Indices of its runs, smallest seed first.
    look: How its curves are drawn.
  """

  lr_z: float
  lr_ratio: float
  runs: np.ndarray
  look: figures.CurveStyle

  @property
  def label(self) -> str:
    """The rates as the paper writes them."""
    return rf"$\eta_Z={self.lr_z:g},\ \eta_Y={self.lr_z * self.lr_ratio:g}$"


def _settings(runs: run_lib.Run) -> list[_Setting]:
  """Lists the pairs of learning rates, in the order of the runs."""
  rates = [
      (float(z), float(ratio))
      for z, ratio in zip(runs.lr_z, runs.lr_ratio, strict=True)
  ]
  pairs = list(dict.fromkeys(rates))
  # Colours follow what varies: the ratio, eta_Z, or both.
  for keys in (
      [p[1] for p in pairs],
      [p[0] for p in pairs],
      [*map(float, range(len(pairs)))],
  ):
    if len(set(keys)) == len(pairs):
      break
  looks = figures.curve_styles(keys)
  order = np.argsort(runs.seed, kind="stable")
  return [
      _Setting(
          *pair, np.array([r for r in order if rates[r] == pair]), looks[k]
      )
      for pair, k in zip(pairs, keys, strict=True)
  ]


def _draw_attention(
    figure: Any, result: train.Result, settings: Sequence[_Setting]
) -> None:
  """Draws c_n as one heat map per setting and class."""
  num_classes = min(2, result.classes.num_classes)
  evaluations = _shown_evaluations(result)
  groups = _token_groups(result.classes, num_classes)
  tokens = np.concatenate([*groups.values()])
  maps = np.stack([
      result.history.attended[s.runs[0]][evaluations, :num_classes][..., tokens]
      for s in settings
  ])
  grid = _heat_map_grid(figure, len(settings), num_classes)
  image: Any = None
  for (s, n), axes in np.ndenumerate(grid):
    never = result.classes.probs[n, tokens] == 0
    values = np.where(never, np.nan, maps[s, :, n]).T
    image = figures.draw_heat_map(axes, values, float(maps.max()))
    # The empty line is the setting's: an annotation gets no room by itself.
    axes.set(title=f"\nclass {n + 1}", xlabel="step")
    _label_steps(axes, result.steps[evaluations])
    _mark_groups(axes, groups, is_first=n == 0 and s % _SETTINGS_PER_ROW == 0)
  for axes, setting in zip(grid[:, 0], settings, strict=True):
    axes.annotate(
        setting.label,
        (num_classes / 2, 1),
        (0, 16),
        xycoords="axes fraction",
        textcoords="offset points",
        ha="center",
        in_layout=False,
    )
  figure.colorbar(
      image,
      ax=grid.ravel().tolist(),
      label="attention $c_{l|n}$",
      pad=0.01,
      aspect=20 * -(-len(settings) // _SETTINGS_PER_ROW),
  )


def _heat_map_grid(
    figure: Any, num_settings: int, num_classes: int
) -> np.ndarray:
  """Makes axes [num_settings, num_classes], a few settings per row."""
  per_row = min(num_settings, _SETTINGS_PER_ROW)
  widths = [*[1] * num_classes, 0.06]  # The last keeps the settings apart.
  grid = figure.subplots(
      -(-num_settings // per_row),
      per_row * len(widths),
      squeeze=False,
      sharey=True,
      width_ratios=widths * per_row,
  ).reshape(-1, len(widths))
  for axes in (*grid[:, -1], *grid[num_settings:, :-1].ravel()):
    axes.remove()
  return grid[:num_settings, :-1]


def _label_steps(axes: mpl_axes.Axes, steps: np.ndarray) -> None:
  """Labels every second column, counted from the last one."""
  labels = [
      str(step) if (len(steps) - i) % 2 else ""
      for i, step in enumerate(steps.tolist())
  ]
  axes.set_xticks(range(len(steps)), labels)


def _shown_evaluations(result: train.Result) -> list[int]:
  """Chooses the evaluations of a heat map; the last one is always there."""
  if result.history.attended.shape[1] < len(result.steps):
    return [-1]  # Only the last one was recorded.
  shown = np.flatnonzero(np.isin(result.steps[:-1], _SHOWN_STEPS))
  return [*shown.tolist(), -1]


def _token_groups(
    classes: data.SequenceClasses, num_classes: int
) -> dict[str, np.ndarray]:
  """Sorts the contextual tokens of some classes: common, then distinct."""
  common = classes.is_common[:num_classes].any(axis=0)
  groups = {"common": np.flatnonzero(common)}
  for n in range(num_classes):
    distinct = np.flatnonzero(classes.is_distinct[n])
    rarest_first = np.argsort(classes.probs[n, distinct], kind="stable")
    groups[f"distinct, class {n + 1}"] = distinct[rarest_first]
  return {name: tokens for name, tokens in groups.items() if len(tokens)}


def _mark_groups(
    axes: mpl_axes.Axes, groups: Mapping[str, np.ndarray], is_first: bool
) -> None:
  """Draws lines between groups of tokens; names them if first in the row."""
  sizes = np.array([len(tokens) for tokens in groups.values()])
  ends = np.cumsum(sizes)
  for end in ends[:-1]:
    axes.axhline(end - 0.5, color="black", linewidth=0.8)
  axes.tick_params(axis="y", length=0)
  if is_first:
    centers = ends - sizes / 2 - 0.5
    axes.set_yticks(centers, [*groups], rotation=90, va="center")
    axes.set_ylabel("contextual token $l$")


def _draw_losses(
    axes: mpl_axes.Axes, losses: np.ndarray, setting: _Setting
) -> None:
  """Draws mean and range [R, N]: a deviation may pass 0 on a log axis."""
  steps = np.arange(losses.shape[1])
  axes.plot(
      steps,
      losses.mean(axis=0),
      markevery=figures.sparsely(len(steps), setting.look),
      label=setting.label,
      **setting.look._asdict(),
  )
  low, high = losses.min(axis=0), losses.max(axis=0)
  figures.shade(axes, steps, low, high, setting.look)


def _draw_sparsity(
    axes: mpl_axes.Axes,
    result: train.Result,
    curves: np.ndarray,
    setting: _Setting,
) -> None:
  own = curves[setting.runs]
  figures.draw_band(axes, result.steps, own, setting.look, setting.label)


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
  """Lists eta_Y / eta_Z, mean and sample std over seeds, each [N]."""
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
      other = 1.0 if 1.0 in others else others.min()
      thresholds = _thresholds(result.classes.num_tokens)
      for value, look in looks.items():
        own = (getattr(result.runs, axis) == value) & (others == other)
        if own.any():
          recall = _recall(result, own, thresholds)
          label = f"${symbol}={value:g}$"
          figures.draw_band(axes, thresholds, recall, look, label)
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
  """Computes recall after training, [R, N]."""
  recall = jax.vmap(metrics.distinct_recall, in_axes=(0, None, None))
  return np.asarray(
      recall(
          jnp.asarray(result.history.attended[own, -1]),
          jnp.asarray(result.classes.is_distinct),
          jnp.asarray(thresholds),
      )
  )
