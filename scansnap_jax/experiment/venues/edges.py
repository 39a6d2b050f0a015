"""Where a panel ends: ranges, markers and layers at its edges.

Letters: S points.
"""

from collections.abc import Mapping
import types
from typing import Any

from jaxtyping import Num
from matplotlib import axes as mpl_axes
from matplotlib import figure as mpl_figure
from matplotlib import ticker as mpl_ticker
import numpy as np

# Names what `figures.shade` draws.
BAND = "range"
# Names what is drawn beside a figure's own numbers.
MARKS = "above"
_OPEN: Mapping[str, Any] = types.MappingProxyType(
    dict(markerfacecolor="white", markersize=4.5, markeredgewidth=0.8)
)


def cut_bands(figure: mpl_figure.Figure) -> None:
  """Ends ranges before 0, which would fill a log axis to its end."""
  for axes in figure.axes:
    bands = [band for band in axes.collections if band.get_gid() == BAND]
    for band in bands if axes.get_yscale() == "log" else ():
      for path in band.get_paths():
        # One edge, the other one backwards, and an end of each side again.
        edge: Any = path.vertices
        count = (len(edge) - 3) // 2
        low, high = edge[1 : count + 1, 1], edge[count + 2 : -1, 1][::-1]
        low[:] = np.where(low > 0, low, high)


def show_whole_markers(figure: mpl_figure.Figure) -> None:
  """Lets markers of points at an axis's end stand out of the panel.

  Curves that leave the panel are cut as ever.
  """
  for axes in figure.axes:
    for line in axes.lines:
      points = np.asarray(line.get_xydata(), float)
      inside = np.ones(len(points), bool)
      for values, ends in zip(
          points.T, (axes.get_xlim(), axes.get_ylim()), strict=True
      ):
        inside &= ~((values < min(ends)) | (values > max(ends)))
      shown = np.isfinite(points).all(axis=1)
      is_marked = line.get_marker() not in ("None", "", None)
      if (
          is_marked
          and line.get_transform() == axes.transData
          and np.any(shown)
          and inside.all()
      ):
        line.set_clip_on(False)


def mark_above(
    axes: mpl_axes.Axes,
    x: Num[np.ndarray, "S"],
    y: Num[np.ndarray, "S"],
    color: str,
) -> None:
  """Marks points above the panel by open triangles at its upper edge."""
  top = axes.get_ylim()[1]
  above = np.asarray(x)[np.asarray(y) > top]
  if not above.size:
    return
  # The table of a figure's numbers has the points themselves.
  (line,) = axes.plot(above, np.full(len(above), top), "^", color=color)
  line.set(gid=MARKS, **_OPEN)


def count_layers(axes: mpl_axes.Axes, num_layers: int) -> None:
  """Makes x an axis of whole layers, with the first and last one inside."""
  margin = max(0.02 * num_layers, 0.5 if num_layers == 1 else 0)
  axes.set_xlim(-margin, num_layers - 1 + margin)
  axes.xaxis.set_major_locator(
      mpl_ticker.MaxNLocator(integer=True, min_n_ticks=1)
  )
