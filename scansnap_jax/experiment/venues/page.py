"""The page that figures are drawn for: its width, its letters.

Text widths and sizes of letters of papers are those of tueplots
(https://tueplots.readthedocs.io), which has them from the style files of the
conferences: 5.5 inches at NeurIPS and ICLR, 6.75 at ICML, whose columns have
3.25. No letter is smaller than 7 points. The letters themselves come with
matplotlib, so that a figure is the same on every machine.
"""

from collections.abc import Mapping
import importlib
from typing import Any, NamedTuple

from scansnap_jax.experiment import errors

SCREEN = "screen"
NAMES = (SCREEN, "neurips", "icml", "iclr")
SMALLEST = 7
# Those of the conferences' last style that tueplots knows.
_BUNDLES = {"neurips": "neurips2024", "icml": "icml2024", "iclr": "iclr2024"}
_SIZES = (
    *("font.size", "axes.labelsize", "axes.titlesize"),
    *("legend.fontsize", "xtick.labelsize", "ytick.labelsize"),
)
# Where a page has one column, a figure of one panel takes this part of it.
_PART = 0.6


class Page(NamedTuple):
  """What a figure is drawn for.

  Attributes:
    width: Of the text, in inches.
    column_width: Of a figure of one panel, in inches.
    settings: matplotlib's, beside those of every figure.
  """

  width: float
  column_width: float
  settings: Mapping[str, Any]


_ON_SCREEN = Page(6.9, 3.35, {})
_chosen = _ON_SCREEN


def use(name: str) -> None:
  """Chooses the page of all figures that are drawn from now on.

  Args:
    name: One of `NAMES`.

  Raises:
    UserError: It needs tueplots, which is not installed.
  """
  global _chosen
  _chosen = _ON_SCREEN if name == SCREEN else _paper(name)


def chosen() -> Page:
  """The page that `use` chose."""
  return _chosen


def _paper(name: str) -> Page:
  try:
    # Imported here: an extra that figures for a screen do without.
    bundles = importlib.import_module("tueplots.bundles")
  except ImportError as error:
    raise errors.UserError(
        f"--figure_style={name} needs tueplots: pip install"
        " 'scansnap-jax[figures]'"
    ) from error
  bundle = getattr(bundles, _BUNDLES[name])
  has_columns = name == "icml"
  if has_columns:
    column = bundle(usetex=False, column="half")
    bundle = bundle(usetex=False, column="full")
  else:
    column = bundle(usetex=False, rel_width=_PART)
    bundle = bundle(usetex=False)
  sizes = {size: max(SMALLEST, bundle[size]) for size in _SIZES}
  letters = {
      "font.family": "serif",
      "font.serif": ["STIXGeneral"],  # Times, as it comes with matplotlib.
      "mathtext.fontset": "stix",
      "figure.titlesize": sizes["axes.titlesize"],
  }
  width, column_width = (b["figure.figsize"][0] for b in (bundle, column))
  return Page(width, column_width, {**sizes, **letters})
