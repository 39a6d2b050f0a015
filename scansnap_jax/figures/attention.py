"""Figures 4 and 5 of Scan & Snap (https://arxiv.org/abs/2305.16380).

Attention along training: heat maps, losses and entropies. The functions take
the results of `train.train_and_evaluate`, return a figure and write nothing;
`CAPTIONS` says what each shows.

Letters as in `scansnap_jax`.
"""

from collections.abc import Mapping, Sequence
import types
from typing import Any, NamedTuple

from matplotlib import axes as mpl_axes
from matplotlib import figure as mpl_figure
import numpy as np

from scansnap_jax import data
from scansnap_jax import published
from scansnap_jax import run as run_lib
from scansnap_jax import train
from scansnap_jax.experiment import figures

# A whole figure, or its upper or lower part.
_Figure = mpl_figure.Figure | mpl_figure.SubFigure

# eta_Y / eta_Z -> (steps, distinct entropy, common mass), each [S].
Flow = Mapping[float, tuple[np.ndarray, np.ndarray, np.ndarray]]

# The iterations of Figures 4 and 5; the last one is added.
_SHOWN_STEPS = (0, 2, 4, 6, 8, 10)

_SETTINGS_PER_ROW = 3

_HEAT_MAPS = (
    "Attention c_n of the first two classes, one column per iteration, on"
    " common tokens and on the distinct tokens of each class (rarest first);"
    " hatched: tokens that the class never draws. One run, that of the smallest"
    " seed. Below: loss of each batch before its update, entropy of attention"
    " over distinct tokens and attention on common tokens after it. Lines: mean"
    " over seeds; bands: smallest to largest (from the mean up where a loss is"
    " 0)"
)

CAPTIONS = types.MappingProxyType({
    "figure4": (
        _HEAT_MAPS
        + ". Dotted black: gradient flow with the same rates and momentum for"
        " infinitely long sequences. Open circles: the authors' losses"
        " (seed 2)."
    ),
    "figure5": (
        _HEAT_MAPS
        + ", under Adam. Dotted black: SGD with momentum at η_Y = η_Z = 1, by"
        " its gradient flow for infinitely long sequences."
    ),
})


def figure4(
    result: train.Result,
    flow: Flow | None = None,
    *,
    show_published: bool = True,
    flow_label: str = "gradient flow",
) -> mpl_figure.Figure:
  """Draws attention along training, with loss and sparsity.

  Args:
    result: Runs of one data setting, at one or more pairs of learning rates.
    flow: What gradient flow predicts for infinitely long sequences, over the
      same steps; drawn over the runs.
    show_published: Whether to draw the authors' losses at eta_Y = eta_Z = 1,
      which are those of Syn-Small under SGD.
    flow_label: What the curves of `flow` are called.

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
      for axes, steps, curves in (
          (loss, np.arange(history.losses.shape[1]), history.losses),
          (entropy, result.steps, history.distinct_entropy),
          (mass, result.steps, history.common_mass),
      ):
        _draw_range(axes, steps, curves[setting.runs], setting)
    for ratio, (steps, *curves) in (flow or {}).items():
      if ratio in {setting.lr_ratio for setting in settings}:
        for axes, curve in zip((entropy, mass), curves, strict=True):
          axes.plot(steps, curve, "k:", label=flow_label)
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
  """Draws what `figure4` does, with SGD's flow to compare with.

  Args:
    result: Runs under Adam.
    flow: As for `figure4`, of SGD at eta_Y = eta_Z = 1.

  Returns:
    The figure, without the authors' losses, which are SGD's.
  """
  return figure4(result, flow, show_published=False, flow_label="SGD, flow")


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


def _settings(runs: run_lib.SweepRun) -> list[_Setting]:
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
    figure: _Figure, result: train.Result, settings: Sequence[_Setting]
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
    axes.set(title=f"\nclass {n + 1}")
    axes.set_xlabel("step, not to scale")
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
    figure: _Figure, num_settings: int, num_classes: int
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


def _draw_range(
    axes: mpl_axes.Axes,
    steps: np.ndarray,
    curves: np.ndarray,
    setting: _Setting,
) -> None:
  """Draws mean and range of curves [R, S]: a deviation may pass 0.

  A range that begins at 0, which no log axis has, begins at the mean.
  """
  mean = curves.mean(axis=0)
  axes.plot(
      steps,
      mean,
      markevery=figures.sparsely(len(steps), setting.look),
      label=setting.label,
      **setting.look._asdict(),
  )
  low, high = curves.min(axis=0), curves.max(axis=0)
  figures.shade(axes, steps, np.where(low > 0, low, mean), high, setting.look)
