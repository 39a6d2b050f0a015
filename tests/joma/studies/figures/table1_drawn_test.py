import json
import pathlib

from absl.testing import absltest
import numpy as np
import pytest

from joma.studies.figures import table1
from scansnap_jax.experiment import figures

_NAMES = {name for _, names in table1._ROWS for name in names}


def make_summary(num_cells=12):
  """A summary as read back from JSON, with scores that tell cells apart."""
  spread = lambda mean: {"mean": mean, "std": 0.02}
  cells = [
      {
          "num_classes": 20 + i,
          "num_combinations": 2,
          "num_latents": [10, 20],
          "levels": [
              {
                  name: spread(0.3 + 0.1 * level + 0.01 * i + 0.05 * j)
                  for j, name in enumerate(sorted(_NAMES))
              }
              for level in range(2)
          ],
      }
      for i in range(num_cells)
  ]
  return json.loads(json.dumps({"cells": cells}))


class Table1Test(absltest.TestCase):

  def test_every_score_of_every_cell_is_drawn(self):
    summary = make_summary(5)
    figure = table1.draw(summary)
    panels = [axes for part in figure.subfigs for axes in part.axes]
    self.assertLen(panels, 4)
    drawn = [line for axes in panels for line in axes.get_lines()]
    heights = [
        tuple(np.round(line.get_ydata(), 6))
        for line in drawn
        if len(line.get_ydata()) == 5
    ]
    for level in range(2):
      for name in _NAMES:
        expected = tuple(
            round(cell["levels"][level][name]["mean"], 6)
            for cell in summary["cells"]
        )
        self.assertIn(expected, heights)
    labels = [tick.get_text() for tick in panels[-1].get_xticklabels()]
    self.assertEqual(labels[0], "20, 2, 10+20")

  @pytest.mark.slow
  def test_is_written(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    paths = figures.save(table1.draw(make_summary()), folder, "t1")
    for path in paths:
      self.assertGreater(path.stat().st_size, 10_000)


if __name__ == "__main__":
  absltest.main()
