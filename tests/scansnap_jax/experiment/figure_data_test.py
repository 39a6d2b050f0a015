"""Tests that a figure's table holds what was drawn."""

import csv
import io
import pathlib

from absl.testing import absltest
import numpy as np

from scansnap_jax.experiment import figure_data
from scansnap_jax.experiment import figures


def _rows(draw, num_panels=1):
  """Reads the table of a figure that `draw` fills."""
  figure = figures.make_figure(4, 2)
  draw(*figure.subplots(1, num_panels, squeeze=False).ravel())
  return list(csv.DictReader(io.StringIO(figure_data.to_csv(figure))))


def _points(rows):
  return [(float(row["x"]), float(row["y"])) for row in rows]


class ToCsvTest(absltest.TestCase):

  def test_lines_with_their_panel(self):
    def draw(first, second):
      first.plot([1, 2], [0.5, 1 / 3], label="a, b")
      first.plot([3], [np.nan])
      first.set(title="$c_n$", xlabel="step", ylabel="entropy")
      second.plot([1, 10], [4, 5], label="c")

    rows = _rows(draw, 2)
    self.assertEqual(_points(rows[:2]), [(1, 0.5), (2, 0.333333333)])
    first = rows[0]
    self.assertEqual([first["panel"], first["title"]], ["1", "$c_n$"])
    self.assertEqual([first["x_label"], first["y_label"]], ["step", "entropy"])
    self.assertEqual([row["series"] for row in rows[:3]], ["a, b", "a, b", "2"])
    self.assertEqual(rows[2]["y"], "nan")
    self.assertEqual([row["panel"] for row in rows[3:]], ["2", "2"])

  def test_bars_points_ranges_and_bands(self):
    def draw(axes):
      axes.bar([1, 2], [3, 4], label="bars")
      axes.scatter([5, 6], [7, 8], label="cloud")
      axes.errorbar([9], [10], [0.5], label="mean")
      axes.fill_between([0, 1], [2, 3], [4, 5])

    rows = _rows(draw)
    of = lambda kind: _points(row for row in rows if row["kind"] == kind)
    self.assertEqual(of("bar"), [(1, 3), (2, 4)])
    self.assertEqual(of("points"), [(5, 7), (6, 8)])
    self.assertEqual(of("range"), [(9, 9.5), (9, 10.5)])
    self.assertContainsSubset({(0, 2), (1, 3), (1, 5), (0, 4)}, of("band"))

  def test_saved_beside_the_figure(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    figure = figures.make_figure(2, 2)
    figure.subplots().plot([1, 2], [3, 4])
    png, _ = figures.save(figure, folder, "a")
    table = png.with_suffix(".csv").read_text()
    self.assertEqual(table.count("\n"), 3)


if __name__ == "__main__":
  absltest.main()
