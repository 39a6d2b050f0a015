"""What the figures of several studies draw: looks, bands and points.

Letters as in `joma.studies`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from matplotlib import axes as mpl_axes
from matplotlib import figure as mpl_figure
import numpy as np

from scansnap_jax.experiment import figures

# A number, or numbers, as measured or as read back from JSON.
Values = float | np.number | np.ndarray | Sequence[Any]

MODE_TITLES = {"gaussian": "moving bump", "random": "random contexts"}
STYLES = ("-", (0, (5, 1.2)))
# Known twice, by colour and by line.
WITH, WITHOUT = (
    figures.CurveStyle("#0072B2", "o", "-"),
    figures.CurveStyle("#D55E00", "s", (0, (5, 1.2))),
)


def looks(count: int) -> list[figures.CurveStyle]:
  """Chooses looks of which the first differ most, also in grey."""
  others = map(float, range(100, 100 + count))
  values = (0.5, 1.0, 2.0, 0.2, 4.0, 0.1, 8.0, *others)
  return [*figures.curve_styles(values).values()][:count]


def looks_of(names: Sequence[str]) -> dict[str, figures.CurveStyle]:
  """Gives each name its look; grey and pink come after the darker colours."""
  # No rates of the paper, so that they take the palette in order.
  numbers = [1000.0 + i for i in range(max(7, len(names)))]
  chosen = [*figures.curve_styles(numbers).values()]
  order = (*chosen[2:7], *chosen[:2], *chosen[7:])
  return dict(zip(names, order, strict=False))


def draw_curve(
    axes: mpl_axes.Axes,
    x: np.ndarray,
    y: np.ndarray | Sequence[float],
    look: figures.CurveStyle,
    label: str,
) -> None:
  """Draws a line with a few markers."""
  every = figures.sparsely(len(x), look)
  axes.plot(x, y, **look._asdict(), markevery=every, label=label)


def draw_range(
    axes: mpl_axes.Axes,
    x: np.ndarray,
    band: Mapping[str, Sequence[float]],
    look: figures.CurveStyle,
    label: str,
) -> None:
  """Draws a mean, and the range from the smallest to the largest run."""
  draw_curve(axes, x, band["mean"], look, label)
  low, high = np.asarray(band["min"]), np.asarray(band["max"])
  figures.shade(axes, x, low, high, look)


def shifts(count: int) -> Float[np.ndarray, "E"]:
  """Offsets that set `count` points of one place apart, sideways."""
  # Centred, so that the place itself is in the middle of its points.
  return 0.15 * (np.arange(count) - (count - 1) / 2)


def tail(parts: Mapping[str, Values]) -> dict[str, np.ndarray]:
  """Leaves the start away, where nothing has changed yet."""
  return {key: np.asarray(value)[1:] for key, value in parts.items()}


def points(rows: Sequence[Mapping[str, Values]]) -> Float[np.ndarray, "3 E"]:
  """Collects intervals of entries: mean, low and high as rows."""
  return np.array([[row[k] for row in rows] for k in ("mean", "low", "high")])


def as_errors(
    x: Values, values: Float[np.ndarray, "3 E"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Turns mean, low and high into what `Axes.errorbar` takes: x, y, yerr."""
  mean, low, high = values
  return np.asarray(x), mean, np.stack([mean - low, high - mean])


def draw_points(
    axes: mpl_axes.Axes,
    x: Values,
    values: Float[np.ndarray, "3 E"],
    look: figures.CurveStyle,
    label: str,
) -> None:
  """Draws means with their intervals, joined by the line of the look."""
  x, mean, errors = as_errors(x, values)
  axes.errorbar(
      x, mean, errors, **look._asdict(), label=label or None, elinewidth=0.7
  )


def draw_interval(
    axes: mpl_axes.Axes,
    x: np.ndarray,
    parts: Mapping[str, Values],
    look: figures.CurveStyle,
    label: str,
) -> None:
  """Draws a mean along training, shaded from `low` to `high`."""
  mean, low, high = (np.asarray(parts[k]) for k in ("mean", "low", "high"))
  every = figures.sparsely(len(x), look)
  axes.plot(x, mean, **look._asdict(), markevery=every, label=label or None)
  figures.shade(axes, x, low, high, look)


def draw_recall(
    summary: Mapping[str, Any], names: Sequence[str], height: float
) -> mpl_figure.Figure:
  """Draws the share of right answers along training, and that of a guess.

  Args:
    summary: With `steps`, `guess` and, by name, `rows` that have `scores`.
    names: Of all models, which gives each its look.
    height: Of the figure, in inches.
  """
  look = looks_of(names)
  with figures.style():
    figure = figures.make_figure(figures.COLUMN_WIDTH, height)
    axes = figure.subplots()
    for name, row in summary["rows"].items():
      steps = np.asarray(summary["steps"])
      draw_interval(axes, steps, row["scores"], look[name], name)
    axes.axhline(summary["guess"], color="black", linestyle=":")
    axes.set(xlabel="step", ylabel="share of right answers", ylim=(0, 1.03))
    axes.locator_params(axis="x", integer=True)
    figures.put_legend_above(figure, figures.legend_entries(axes))
  return figure
