"""The look of every figure, and how one is written.

Categorical curves take the colours of Okabe and Ito, which people with any
kind of colour vision tell apart, and differ in marker and line as well, so that
they survive greyscale. Heat maps take perceptually uniform colours.

Figures are built on matplotlib's objects, without pyplot: no backend is
chosen, nothing is registered globally, and `style` restores what it sets.

Letters as in `scansnap_jax`.
"""

from collections.abc import Iterable, Iterator, Mapping
import contextlib
import io
import pathlib
import types
from typing import Any, NamedTuple

from jaxtyping import Float, Num
import matplotlib
from matplotlib import axes as mpl_axes
from matplotlib import figure as mpl_figure
from matplotlib import image as mpl_image
from matplotlib import lines as mpl_lines
from matplotlib import rcsetup
import numpy as np

from scansnap_jax.experiment import figure_data
from scansnap_jax.experiment import workdir
from scansnap_jax.experiment.venues import edges
from scansnap_jax.experiment.venues import fit
from scansnap_jax.experiment.venues import page

# Inches: the text width of a two-column page, and one of its columns, for which
# figures are laid out; `make_figure` makes them those of the chosen page.
PAGE_WIDTH = 6.9
COLUMN_WIDTH = 3.35

# Okabe-Ito, with grey for black, which is kept for theory and for what others
# published, and without yellow, which is too faint for a line on white.
_COLORS = (
    "#7A7A7A",
    "#CC79A7",
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#E69F00",
    "#56B4E9",
)
_MARKERS = ("v", "P", "o", "s", "^", "D", "X")
_LINES = ("-", (0, (5, 1.2)), (0, (3, 1, 1, 1)), (0, (1, 1)))

# A learning rate, or a ratio of two, looks the same in every figure. Values
# that share a place never meet in one figure of the paper.
_PLACE_OF_RATE = {
    0.1: 0,
    0.2: 1,
    0.5: 2,
    1.0: 3,
    2.0: 4,
    3.0: 1,
    4.0: 5,
    5.0: 5,
    8.0: 6,
    10.0: 6,
}

_RC = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # Comes with matplotlib: same anywhere.
    "mathtext.fontset": "dejavusans",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "figure.titlesize": 9,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,  # A number of a paper is whole.
    "axes.grid": True,
    "axes.prop_cycle": rcsetup.cycler(color=_COLORS),
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.5,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.minor.size": 1.5,
    "ytick.minor.size": 1.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.6,
    "errorbar.capsize": 1.8,
    "legend.frameon": False,
    "legend.handlelength": 2.4,
    "image.cmap": "magma_r",
    "hatch.linewidth": 0.5,
    "image.interpolation": "nearest",
    "savefig.dpi": 300,
    "savefig.facecolor": "white",
    "pdf.fonttype": 42,  # Text stays text: searchable, and editable.
}


class CurveStyle(NamedTuple):
  """How one curve of several is told from the others, in colour and in grey."""

  color: str
  marker: str
  linestyle: str | tuple[int, tuple[float, ...]]


_KNOWN = CurveStyle("black", "o", "")
_OPEN: Mapping[str, Any] = types.MappingProxyType(
    dict(
        linestyle="",
        markerfacecolor="white",
        markersize=5,
        markeredgewidth=0.8,
    )
)


@contextlib.contextmanager
def style() -> Iterator[None]:
  """Applies the look to whatever is made or saved within; then restores."""
  with matplotlib.rc_context():
    matplotlib.rcdefaults()
    matplotlib.rcParams.update(_RC)
    matplotlib.rcParams.update(page.chosen().settings)
    yield


def make_figure(width: int | float, height: int | float) -> mpl_figure.Figure:
  """Makes an empty figure that lays itself out.

  Args:
    width: In inches, where a page is `PAGE_WIDTH` and a column `COLUMN_WIDTH`;
      on another page it takes the same part of it.
    height: In inches.
  """
  if width <= COLUMN_WIDTH:
    width *= page.chosen().column_width / COLUMN_WIDTH
  else:
    width *= page.chosen().width / PAGE_WIDTH
  return mpl_figure.Figure(figsize=(width, height), layout="constrained")


def as_is(name: str) -> str:
  """Returns the label that shows a name of the user's as it is.

  Two dollar signs would be read as a formula, and a legend leaves out what
  begins with an underscore.
  """
  escaped = name.replace("$", r"\$")
  return f"\u200b{escaped}" if escaped.startswith("_") else escaped


def save(
    figure: mpl_figure.Figure, folder: pathlib.Path, name: str
) -> tuple[pathlib.Path, pathlib.Path]:
  """Writes a figure as PNG and PDF, its numbers as CSV, and frees it.

  The files depend on the figure alone, not on when they are written.

  Args:
    figure: The figure. It is empty afterwards.
    folder: Made if need be.
    name: File name without its extension, also the title of the PDF.

  Returns:
    The paths of the PNG (300 dots per inch) and of the PDF.

  Raises:
    UserError: They cannot be written.
  """
  workdir.make_folder(folder)
  table = figure_data.to_csv(figure)
  edges.cut_bands(figure)
  edges.show_whole_markers(figure)
  if page.chosen().settings:
    with style():
      fit.break_long(figure)
  metadata = {
      "png": {"Software": None},
      "pdf": {"Title": name, "CreationDate": None},
  }
  paths = []
  # Names of versions and times would make equal figures differ.
  for kind, entries in metadata.items():
    buffer = io.BytesIO()
    with style():
      figure.savefig(buffer, format=kind, metadata=entries)
    paths.append(folder / f"{name}.{kind}")
    workdir.write_atomic(paths[-1], buffer.getvalue())
  workdir.write_atomic(folder / f"{name}.csv", table)
  figure.clear()
  return paths[0], paths[1]


def curve_styles(values: Iterable[float]) -> dict[float, CurveStyle]:
  """Gives each value its look.

  The rates of the paper always get the same one; others get what is left, and
  an eighth value starts again with another line.

  Args:
    values: What tells the curves of a figure apart.

  Returns:
    A look for each, all different for up to 28 values.
  """
  free = list(range(len(_COLORS) * len(_LINES)))
  places = {}
  for value in dict.fromkeys(values):
    rate = round(float(value), 6)  # 0.1 in float32 is a rate of the paper too.
    place = _PLACE_OF_RATE.get(rate, free[0])
    places[value] = place if place in free else free[0]
    free.remove(places[value])
  return {value: _curve_style(place) for value, place in places.items()}


def _curve_style(place: int) -> CurveStyle:
  lap, place = divmod(place, len(_COLORS))
  line = _LINES[(place + lap) % len(_LINES)]
  return CurveStyle(_COLORS[place], _MARKERS[place], line)


def draw_band(
    axes: mpl_axes.Axes,
    x: Num[np.ndarray, "S"],
    curves: Float[np.ndarray, "R S"],
    look: CurveStyle,
    label: str,
    *,
    least: float | int = -np.inf,
    most: float | int = np.inf,
) -> None:
  """Draws the mean of curves [R, S] and a band of one standard deviation.

  The deviation is that of the sample (ddof 1); one run alone has no band.

  Args:
    axes: Where.
    x: Positions.
    curves: One row a run.
    look: How.
    label: For the legend.
    least: Least value that there can be; the band ends there.
    most: Largest value that there can be.
  """
  mean = curves.mean(axis=0)
  every = sparsely(len(x), look)
  axes.plot(x, mean, **look._asdict(), markevery=every, label=label)
  if len(curves) > 1:
    spread = curves.std(axis=0, ddof=1)
    low = np.maximum(mean - spread, least)
    shade(axes, x, low, np.minimum(mean + spread, most), look)


def sparsely(num_points: int, look: CurveStyle) -> tuple[int, int]:
  """Chooses about eight points of a curve to mark: (first, step).

  Other points for each look, so that curves that coincide all show.
  """
  every = max(1, num_points // 8)
  share = (_MARKERS.index(look.marker) + 1) / (len(_MARKERS) + 1)
  return int(every * share), every


def shade(
    axes: mpl_axes.Axes,
    x: Num[np.ndarray, "S"],
    low: Float[np.ndarray, "S"],
    high: Float[np.ndarray, "S"],
    look: CurveStyle,
) -> None:
  """Fills the range of a curve; none where it reaches 0 on a log axis."""
  axes.fill_between(
      x, low, high, color=look.color, alpha=0.15, linewidth=0, gid=edges.BAND
  )


def draw_points(
    axes: mpl_axes.Axes,
    x: Num[np.ndarray, "S"],
    mean: Float[np.ndarray, "S"],
    spread: Float[np.ndarray, "S"],
    look: CurveStyle,
    label: str,
) -> None:
  """Draws points with error bars, joined by a line."""
  axes.errorbar(x, mean, spread, **look._asdict(), label=label, elinewidth=0.7)


def draw_known_points(
    axes: mpl_axes.Axes,
    x: Num[np.ndarray, "S"],
    mean: Float[np.ndarray, "S"],
    spread: Float[np.ndarray, "S"] | None = None,
    look: CurveStyle = _KNOWN,
) -> None:
  """Draws what others published: open markers without a line, behind ours."""
  axes.errorbar(
      x,
      mean,
      spread,
      color=look.color,
      marker=look.marker,
      elinewidth=0.7,
      zorder=1.8,
      **_OPEN,
  )


def known_entry() -> mpl_lines.Line2D:
  """Makes the legend's entry for `draw_known_points`, whatever the looks."""
  return mpl_lines.Line2D(
      [], [], color=_KNOWN.color, marker=_KNOWN.marker, **_OPEN
  )


def make_panels(count: int, ylabel: str) -> tuple[mpl_figure.Figure, list]:
  """Makes a figure of `count` panels that share their vertical axis."""
  num_columns = {1: 1, 2: 2, 4: 2}.get(count, 3)
  num_rows = -(-count // num_columns)
  width = COLUMN_WIDTH if count == 1 else PAGE_WIDTH
  figure = make_figure(width, 0.4 + 2.2 * num_rows)
  grid = figure.subplots(num_rows, num_columns, sharey=True, squeeze=False)
  panels = grid.ravel().tolist()
  for axes in panels[count:]:
    axes.remove()
  for axes in grid[:, 0]:
    axes.set_ylabel(ylabel)
  return figure, panels[:count]


def put_legend_above(
    figure: mpl_figure.Figure | mpl_figure.SubFigure, entries: Mapping[str, Any]
) -> None:
  """Puts one legend above all panels, where it covers no data.

  Args:
    figure: A figure or subfigure; its width says how many entries fit a row.
    entries: Label to line; see `legend_entries`.
  """
  # matplotlib does not break lines of a legend: rows are added until it fits,
  # which only a drawn legend tells.
  for num_rows in range(1, len(entries) + 1):
    legend = figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside upper center",
        ncols=-(-len(entries) // num_rows),
    )
    if legend.get_window_extent().width < figure.bbox.width:
      return
    if num_rows < len(entries):
      legend.remove()


def legend_entries(*panels: mpl_axes.Axes) -> dict[str, Any]:
  """Collects what the panels label, each label once."""
  entries = {}
  for axes in panels:
    for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
      entries.setdefault(label, handle)
  return entries


def draw_heat_map(
    axes: mpl_axes.Axes, values: Float[np.ndarray, "rows columns"], limit: float
) -> mpl_image.AxesImage:
  """Draws a matrix, first row on top, from 0 to `limit`; NaN is hatched."""
  axes.grid(False)
  axes.patch.set(hatch="//////", edgecolor="#C8C8C8", linewidth=0)
  for spine in axes.spines.values():
    spine.set_visible(True)
  return axes.imshow(
      np.ma.masked_invalid(values), aspect="auto", vmin=0, vmax=limit
  )
