"""Titles and axis labels that would not fit a narrower page, in more lines.

Figures are laid out for a screen's width. What is as long as its panel there is
longer than it on a page of 5.5 inches, and would run into its neighbour or out
of the figure.
"""

import math
import textwrap

from matplotlib import figure as mpl_figure
from matplotlib import text as mpl_text


def break_long(figure: mpl_figure.Figure) -> None:
  """Breaks titles and labels of panels that are longer than their panel.

  Formulas are left whole, and what has lines already as it is.
  """
  figure.draw_without_rendering()
  for axes in figure.axes:
    frame = axes.get_window_extent()
    for text in (axes.title, axes.xaxis.label):
      _break(text, text.get_window_extent().width / frame.width)
    label = axes.yaxis.label
    _break(label, label.get_window_extent().height / frame.height)


def _break(text: mpl_text.Text, length: float) -> None:
  """Breaks a text of this length, 1 being its panel's."""
  content = text.get_text()
  if length > 1 and not {"$", "\n"} & set(content):
    longest = math.ceil(len(content) / math.ceil(length)) + 2
    lines = textwrap.wrap(content, longest, break_long_words=False)
    text.set_text("\n".join(lines))
