"""Figures on the pages of papers: their widths, and what can be read there."""

import ast
import pathlib
import struct
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
from matplotlib import text as mpl_text
import numpy as np
import pytest

from scansnap_jax.experiment import errors
from scansnap_jax.experiment import figures
from scansnap_jax.experiment.venues import fit
from scansnap_jax.experiment.venues import page
from scansnap_jax.figures import attention
from tests.scansnap_jax.figures import made_up

_ROOT = pathlib.Path(__file__).parents[4]
# Inches, as the conferences tell authors: neurips_2024.sty and
# iclr2024_conference.sty set a text width of 5.5 in; ICML's two columns of
# 3.25 in have .25 in between.
_WIDTHS = {"screen": 6.9, "neurips": 5.5, "iclr": 5.5, "icml": 3.25 * 2 + 0.25}


def _texts(figure):
  """The texts that a drawn figure shows, ticks outside of panels left out."""
  with figures.style():
    figure.draw_without_rendering()
  shown = []
  for axes in figure.axes:
    for axis in (axes.xaxis, axes.yaxis):
      low, high = sorted(axis.get_view_interval())
      for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
        if not low <= tick.get_loc() <= high:
          tick.label1.set_visible(False)
  for text in figure.findobj(mpl_text.Text):
    if text.get_visible() and text.get_text().strip():
      shown.append(text)
  return shown


class PageTest(parameterized.TestCase):

  def tearDown(self):
    page.use(page.SCREEN)
    super().tearDown()

  @parameterized.parameters(*page.NAMES)
  @pytest.mark.by_default(1)
  def test_letters_can_be_read_at_the_printed_size(self, name):
    page.use(name)
    figure = attention.figure4(made_up.result(lr_ratio=(1.0, 10.0)))
    self.assertAlmostEqual(figure.get_size_inches()[0], _WIDTHS[name])
    texts = _texts(figure)
    self.assertGreater(len(texts), 50)
    # Points are 1/72 inch of the figure, which is printed as wide as it is.
    self.assertGreaterEqual(min(t.get_fontsize() for t in texts), 7)
    for text in texts:
      box = text.get_window_extent()
      inside = figure.bbox.padded(1).get_points()
      self.assertTrue((box.get_points() >= inside[0]).all(), text)
      self.assertTrue((box.get_points() <= inside[1]).all(), text)

  def test_a_figure_of_one_panel_takes_a_column(self):
    page.use("icml")
    with figures.style():
      figure, _ = figures.make_panels(1, "y")
    self.assertAlmostEqual(figure.get_size_inches()[0], 3.25)

  @pytest.mark.slow
  def test_files_are_as_wide_as_the_page_and_a_screens_come_back(self):
    folder = pathlib.Path(self.create_tempdir().full_path)

    def save(name):
      with figures.style():
        figure, panels = figures.make_panels(2, "a b")
        panels[0].plot([1, 2])
      png, _ = figures.save(figure, folder / name, "a")
      data = png.read_bytes()
      return data, struct.unpack(">I", data[16:20])[0]

    before, width = save("a")
    self.assertEqual(width, 2070)
    page.use("neurips")
    self.assertEqual(save("b")[1], 1650)  # 5.5 inches of 300 dots.
    page.use(page.SCREEN)
    self.assertEqual(save("c")[0], before)

  def test_without_tueplots_one_sentence_says_so(self):
    with mock.patch.dict("sys.modules", {"tueplots.bundles": None}):
      page.use(page.SCREEN)
      message = r"^--figure_style=icml needs tueplots: .*\[figures\]'$"
      with self.assertRaisesRegex(errors.UserError, message):
        page.use("icml")

  def test_no_code_asks_for_smaller_letters(self):
    found = []
    for package in ("scansnap_jax", "joma"):
      for path in (_ROOT / package).rglob("*.py"):
        if "fontsize" in path.read_text():
          for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "fontsize":
              found.append(ast.literal_eval(node.value))
    self.assertNotEmpty(found)
    self.assertGreaterEqual(min(found), page.SMALLEST)


class FitTest(absltest.TestCase):

  def test_long_texts_get_lines_and_formulas_stay(self):
    page.use("neurips")
    self.addCleanup(page.use, page.SCREEN)
    with figures.style():
      figure, panels = figures.make_panels(3, "gold tokens that are kept still")
      for axes in panels:
        axes.plot(np.arange(3))
        axes.set_xlabel("megabytes of the cache that a step moves")
        axes.set_title("attention on tokens")
      panels[1].set_xlabel("$" + "x + " * 30 + "x$")
      fit.break_long(figure)
    label = panels[0].get_xlabel()
    words = "megabytes of the cache that a step moves"
    self.assertEqual(label.split(), words.split())
    self.assertEqual(label.count("\n"), 1)
    self.assertNotIn("\n", panels[1].get_xlabel() + panels[1].get_title())
    self.assertEqual(panels[0].get_ylabel().count("\n"), 0)


if __name__ == "__main__":
  absltest.main()
