import os
import pathlib
import struct
import subprocess
import sys

from absl.testing import absltest
from absl.testing import parameterized
import matplotlib
import numpy as np
import pytest

from scansnap_jax.experiment import figures
from scansnap_jax.experiment.venues import edges

_SAVE_TWICE = """
import hashlib, pathlib, sys
from scansnap_jax.experiment import figures
from scansnap_jax.experiment.venues import edges
with figures.style():
  figure = figures.make_figure(2, 2)
  figure.subplots().plot([1, 2], label="$x_1$")
for path in figures.save(figure, pathlib.Path(sys.argv[1]), "a"):
  print(hashlib.sha256(path.read_bytes()).hexdigest())
assert "matplotlib.pyplot" not in sys.modules
"""

_SEVEN = tuple(map(float, range(7)))


def _figure(label="a"):
  with figures.style():
    figure = figures.make_figure(2.0, 1.5)
    axes = figure.subplots()
    axes.plot([1, 2, 3], [1, 4, 9], label=label)
    axes.set(title="$c_{l|n}$", xlabel="step")
  return figure


class BandTest(absltest.TestCase):

  def test_a_range_that_reaches_zero_fills_no_log_axis(self):
    look = figures.CurveStyle("C0", "o", "-")
    low, high = np.array([1.0, 0.0, 2.0]), np.array([2.0, 3.0, 4.0])
    for scale, want in (("log", [1, 3, 2]), ("linear", low)):
      with figures.style():
        figure = figures.make_figure(2.0, 1.5)
        axes = figure.subplots()
        figures.shade(axes, np.arange(3), low, high, look)
        axes.set_yscale(scale)  # After it, as figures do.
      (band,) = axes.collections
      edges.cut_bands(figure)
      (path,) = band.get_paths()
      np.testing.assert_array_equal(path.vertices[1:4, 1], want)
      np.testing.assert_array_equal(path.vertices[5:8, 1], high[::-1])


class StyleTest(parameterized.TestCase):

  def test_leaves_nothing_behind(self):
    before = dict(matplotlib.rcParams)
    with figures.style():
      self.assertFalse(matplotlib.rcParams["axes.spines.top"])
    self.assertEqual(dict(matplotlib.rcParams), before)

  def test_numbers_have_no_offset_beside_the_axis(self):
    with figures.style():
      axes = figures.make_figure(2, 2).subplots()
      axes.plot([2.1501, 2.1506])
      axes.figure.draw_without_rendering()
    self.assertEqual(axes.yaxis.get_major_formatter().get_offset(), "")

  def test_settings_of_the_user_do_not_show(self):
    with matplotlib.rc_context({"font.size": 40, "axes.facecolor": "red"}):
      with figures.style():
        self.assertEqual(matplotlib.rcParams["font.size"], 8)
        self.assertEqual(matplotlib.rcParams["axes.facecolor"], "white")


class SaveTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self._folder = pathlib.Path(self.create_tempdir().full_path)

  def test_equal_figures_give_equal_bytes(self):
    first = figures.save(_figure(), self._folder / "1", "a")
    second = figures.save(_figure(), self._folder / "2", "a")
    other = figures.save(_figure("b"), self._folder / "3", "a")
    for path, same in zip(first, second, strict=True):
      self.assertEqual(path.read_bytes(), same.read_bytes())
    self.assertEqual([path.suffix for path in other], [".png", ".pdf"])

  @pytest.mark.slow
  def test_settings_of_the_user_do_not_reach_the_file(self):
    first, _ = figures.save(_figure(), self._folder / "1", "a")
    with matplotlib.rc_context({"savefig.dpi": 50, "text.antialiased": False}):
      second, _ = figures.save(_figure(), self._folder / "2", "a")
    self.assertEqual(first.read_bytes(), second.read_bytes())

  @pytest.mark.slow
  def test_equal_bytes_in_every_process_without_pyplot(self):
    outputs = [
        subprocess.run(
            [sys.executable, "-c", _SAVE_TWICE, self._folder / str(seed)],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            cwd=pathlib.Path(__file__).parents[3],
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
        for seed in (1, 2)
    ]
    self.assertEqual(outputs[0], outputs[1])
    self.assertLen(outputs[0].split(), 2)

  def test_no_date_and_three_hundred_dots_per_inch(self):
    png, pdf = figures.save(_figure(), self._folder, "a")
    self.assertNotIn(b"Date", pdf.read_bytes())
    self.assertNotIn(b"tEXt", png.read_bytes())
    self.assertEqual(struct.unpack(">II", png.read_bytes()[16:24]), (600, 450))

  def test_figure_is_freed(self):
    figure = _figure()
    figures.save(figure, self._folder, "a")
    self.assertEmpty(figure.axes)


class CurveStylesTest(parameterized.TestCase):

  def test_a_rate_looks_the_same_in_every_figure(self):
    sets = [
        (0.5, 1.0, 2.0, 5.0),
        (1.0, 10.0),
        (0.1, 0.5, 1.0),
        (0.5, 1.0, 2.0, 3.0),
        (0.2, 0.5, 1.0, 2.0, 4.0),
        (0.5, 1.0, 2.0, 4.0, 8.0),
        (1.0, 2.0, 5.0, 10.0),
    ]
    sets += [(value,) for values in sets for value in values]
    seen = {}
    for values in sets:
      looks = figures.curve_styles(values)
      self.assertLen({look.color for look in looks.values()}, len(values))
      for value, look in looks.items():
        self.assertEqual(seen.setdefault(value, look), look)

  def test_float32_rate_looks_like_its_decimal(self):
    value = float(np.float32(0.2))
    self.assertEqual(
        figures.curve_styles([value])[value], figures.curve_styles([0.2])[0.2]
    )

  def test_curves_differ_without_colour(self):
    for values in (_SEVEN, (3.0, 0.2), (4.0, 5.0, 8.0, 10.0)):
      looks = figures.curve_styles(values)
      self.assertLen({look.marker for look in looks.values()}, len(values))

  def test_twenty_eight_values_all_differ(self):
    looks = figures.curve_styles(map(float, range(28))).values()
    self.assertLen({(look.color, str(look.linestyle)) for look in looks}, 28)


class SparselyTest(parameterized.TestCase):

  @parameterized.parameters(1, 2, 7, 51, 701)
  def test_marks_points_that_exist(self, num_points):
    for look in figures.curve_styles(_SEVEN).values():
      first, step = figures.sparsely(num_points, look)
      self.assertBetween(len(range(num_points)[first::step]), 1, 9)

  def test_coinciding_curves_are_marked_at_different_points(self):
    looks = figures.curve_styles(_SEVEN).values()
    starts = {figures.sparsely(100, look)[0] for look in looks}
    self.assertLen(starts, 7)


class DrawBandTest(parameterized.TestCase):

  def test_mean_and_sample_deviation(self):
    axes = _figure().axes[0]
    curves = np.array([[1.0, 2.0], [3.0, 2.0], [5.0, 8.0]])
    look = figures.curve_styles([1.0])[1.0]
    figures.draw_band(axes, np.array([0, 1]), curves, look, "runs")
    # Means 3 and 4; squares 4 + 0 + 4 and 4 + 4 + 16, over R - 1 = 2.
    np.testing.assert_allclose(axes.lines[-1].get_ydata(), [3, 4])
    vertices = axes.collections[0].get_paths()[0].vertices
    spread = np.sqrt([4, 12])
    for x in (0, 1):
      at_x = vertices[vertices[:, 0] == x, 1]
      np.testing.assert_allclose(at_x.min(), 3 + x - spread[x])
      np.testing.assert_allclose(at_x.max(), 3 + x + spread[x])

  def test_a_band_ends_where_values_do(self):
    axes = figures.make_figure(2, 2).subplots()
    look = figures.CurveStyle("red", "o", "-")
    curves = np.array([[0.0, 1.0], [0.5, 0.5]])
    figures.draw_band(axes, np.arange(2), curves, look, "a", least=0, most=1)
    (band,) = axes.collections
    heights = band.get_paths()[0].vertices[:, 1]
    self.assertEqual((heights.min(), heights.max()), (0, 1))

  def test_one_run_has_no_band(self):
    axes = _figure().axes[0]
    look = figures.curve_styles([1.0])[1.0]
    figures.draw_band(axes, np.arange(2), np.ones((1, 2)), look, "run")
    self.assertEmpty(axes.collections)


class DrawHeatMapTest(parameterized.TestCase):

  def test_first_row_on_top_and_nan_left_out(self):
    axes = _figure().axes[0]
    values = np.array([[0.1, 0.2], [np.nan, 0.0]])
    image = figures.draw_heat_map(axes, values, 0.5)
    np.testing.assert_array_equal(image.get_array().mask, np.isnan(values))
    self.assertEqual(image.get_clim(), (0, 0.5))
    bottom, top = axes.get_ylim()
    self.assertGreater(bottom, top)
    self.assertIsNotNone(axes.patch.get_hatch())


class MakePanelsTest(parameterized.TestCase):

  @parameterized.parameters((1, 1), (2, 2), (3, 3), (4, 2), (5, 3))
  def test_as_many_panels_as_asked_for(self, count, num_columns):
    with figures.style():
      figure, panels = figures.make_panels(count, "y")
    self.assertLen(panels, count)
    self.assertEqual(figure.axes, panels)
    lefts = {axes.get_subplotspec().colspan.start for axes in panels}
    self.assertLen(lefts, num_columns)
    panels[0].set_ylim(3, 4)
    self.assertEqual({axes.get_ylim() for axes in panels}, {(3, 4)})


class PutLegendAboveTest(parameterized.TestCase):

  @parameterized.parameters(1, 4, 5, 12)
  def test_covers_no_panel_and_stays_on_the_page(self, num_entries):
    with figures.style():
      figure, (axes,) = figures.make_panels(1, "y")
      for i in range(num_entries):
        axes.plot([1, 2], label=f"a rather long label, number {i}")
      figures.put_legend_above(figure, figures.legend_entries(axes))
      figure.draw_without_rendering()
      (legend,) = figure.legends
      box = legend.get_window_extent()
      self.assertGreaterEqual(box.y0, axes.get_window_extent().y1)
      self.assertGreaterEqual(box.x0, 0)
      self.assertLessEqual(box.x1, figure.bbox.x1)
      self.assertLen(legend.get_texts(), num_entries)


class LegendEntriesTest(parameterized.TestCase):

  def test_each_label_once_in_order(self):
    with figures.style():
      figure, panels = figures.make_panels(2, "y")
      for axes, labels in zip(panels, ("ba", "acb"), strict=True):
        for label in labels:
          axes.plot([1], label=label)
    del figure
    self.assertEqual([*figures.legend_entries(*panels)], ["b", "a", "c"])


class DrawKnownPointsTest(parameterized.TestCase):

  def test_open_markers_behind_ours_without_a_line(self):
    axes = _figure().axes[0]
    look = figures.curve_styles([2.0])[2.0]
    x, mean, spread = np.array([[1, 2], [3, 4], [0.1, 0.2]])
    figures.draw_known_points(axes, x, mean, spread, look)
    line = axes.lines[1]
    np.testing.assert_array_equal(line.get_ydata(), [3, 4])
    self.assertEqual(line.get_linestyle(), "None")
    self.assertEqual(line.get_markerfacecolor(), "white")
    self.assertEqual(line.get_marker(), look.marker)
    self.assertLess(line.get_zorder(), axes.lines[0].get_zorder())


if __name__ == "__main__":
  absltest.main()
