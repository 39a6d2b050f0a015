"""The numbers behind the curves of a figure, as a table for other programs."""

from collections.abc import Iterator
import csv
import io
from typing import Any

from matplotlib import axes as mpl_axes
from matplotlib import collections as mpl_collections
from matplotlib import figure as mpl_figure
from matplotlib import patches as mpl_patches
import numpy as np

from scansnap_jax.experiment.venues import edges

_HEADER = ("panel", "title", "x_label", "y_label", "series", "kind", "x", "y")


def to_csv(figure: mpl_figure.Figure) -> str:
  """Returns all points that a figure draws, a row each; pictures are left out.

  `kind` says what a point belongs to: `line`, `points`, `bar` (its middle and
  its end), `range` (the ends of an error bar, one after the other) or `band`
  (the outline of a filled range). A series without a name has its place in the
  panel. Dates and categories are numbers, as matplotlib holds them.
  """
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow(_HEADER)
  for number, axes in enumerate(figure.get_axes(), start=1):
    about = (number, _title(axes), axes.get_xlabel(), axes.get_ylabel())
    for series, kind, points in _series(axes):
      for x, y in np.asarray(points, float).reshape(-1, 2).tolist():
        writer.writerow((*about, series, kind, f"{x:.9g}", f"{y:.9g}"))
  return text.getvalue()


def _title(axes: mpl_axes.Axes) -> str:
  return axes.get_title() or axes.get_title(loc="left")


def _series(axes: mpl_axes.Axes) -> Iterator[tuple[str, str, Any]]:
  """Yields the name, kind and points [N, 2] of all that a panel draws."""
  lines = [line for line in axes.lines if line.get_gid() != edges.MARKS]
  for number, line in enumerate(lines, start=1):
    xy = np.stack(np.broadcast_arrays(*line.get_data(orig=False)), axis=-1)
    yield _name(line, number), "line", xy
  for number, drawn in enumerate(axes.collections, start=1):
    name = _name(drawn, number)
    if isinstance(drawn, mpl_collections.PathCollection):
      yield name, "points", np.ma.getdata(drawn.get_offsets())
    elif isinstance(drawn, mpl_collections.LineCollection):
      for segment in drawn.get_segments():
        yield name, "range", segment
    elif isinstance(drawn, mpl_collections.PolyCollection):
      for path in drawn.get_paths():
        yield name, "band", path.vertices
  for number, group in enumerate(axes.containers, start=1):
    bars = [x for x in group if isinstance(x, mpl_patches.Rectangle)]
    yield _name(group, number), "bar", [_end_of(bar) for bar in bars]


def _name(drawn: Any, number: int) -> str:
  """Its label, or its place among its like."""
  label = str(drawn.get_label())
  return f"{number}" if label.startswith("_") or not label else label


def _end_of(bar: mpl_patches.Rectangle) -> tuple[float, float]:
  """The middle of its foot's side, and where it ends."""
  middle = bar.get_x() + bar.get_width() / 2
  return float(middle), float(bar.get_y() + bar.get_height())
