import pathlib

from absl.testing import absltest
import numpy as np

from scansnap_jax.experiment import figure_data
from scansnap_jax.experiment import figures
from scansnap_jax.experiment.venues import edges


class EdgeTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    self.figure = figures.make_figure(2, 2)
    self.axes = self.figure.subplots()

  def _save(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    lines = list(self.axes.lines)
    figures.save(self.figure, folder, "edge")
    return [line.get_clip_on() for line in lines]

  def test_a_marker_at_the_end_of_an_axis_is_whole(self):
    self.axes.plot([0, 1, 2], [0, np.nan, 1], "o-")
    self.axes.plot([0, 3], [0, 1], "o-")  # Leaves the panel.
    self.axes.plot([0, 2], [0, 1])  # Has no markers.
    self.axes.axhline(0.5, marker="o")  # Is not of the data.
    self.axes.plot([], [], "o")  # Has no place, which no layout takes.
    self.axes.plot([1], [np.nan], "o")
    self.axes.set(xlim=(0, 2), ylim=(0, 1))
    self.assertEqual(self._save(), [False, True, True, True, True, True])

  def test_what_is_above_is_marked_at_the_edge(self):
    self.axes.set_ylim(0, 5)
    x, y = np.array([1, 2, 3]), np.array([4, 6, np.inf])
    edges.mark_above(self.axes, x, y, "red")
    np.testing.assert_array_equal(
        self.axes.lines[0].get_xydata(), [[2, 5], [3, 5]]
    )
    # The table has the numbers of the figure, not the marks.
    self.assertNotIn("line", figure_data.to_csv(self.figure))
    self.assertEqual(self._save(), [False])

  def test_layers_are_whole_numbers(self):
    for num_layers, ticks in ((1, [0]), (2, [0, 1]), (4, [0, 1, 2, 3])):
      edges.count_layers(self.axes, num_layers)
      low, high = self.axes.get_xlim()
      found = [x for x in self.axes.get_xticks() if low <= x <= high]
      self.assertEqual(found, ticks)
      self.assertLess(low, 0)
      self.assertGreater(high, num_layers - 1)


if __name__ == "__main__":
  absltest.main()
