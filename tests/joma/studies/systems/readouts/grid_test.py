from absl.testing import absltest
import jax
import numpy as np
import pytest

from joma.studies.systems.readouts import grid
from joma.studies.systems.subjects import grid_scenes
from joma.transformer import config as configs
from joma.transformer import model as models
from scansnap_jax.experiment import errors
from tests.joma.studies.systems import small


class GridTest(absltest.TestCase):

  @pytest.mark.slow
  def test_runs_and_is_drawn(self):
    summary = small.measured("grid")
    self.assertLen(summary["claims"], 6)
    # Of two layers of attention, and of one behind a convolution.
    for name, num_layers in (("2-D bias", 2), (grid.HYBRID, 1)):
      mass = np.array(summary["boxes"][name]["mass"])
      self.assertEqual(mass.shape, (2, num_layers, 4))
      np.testing.assert_allclose(mass.sum(axis=-1), 1, atol=1e-5)
    figure, texts = small.drawn("grid")
    self.assertLen(figure.axes, 2)
    self.assertContainsSubset(
        ["2-D bias", grid.HYBRID, "weight of [REG]"], texts
    )

  def test_marks_are_as_far_on_one_row_as_on_two(self):
    task = grid_scenes.Marks(size=5)
    draw = jax.jit(task.draw, static_argnums=1)
    tokens, targets, is_asked, _ = map(np.asarray, draw(jax.random.key(0), 300))
    seen = set()
    for text, target in zip(tokens, targets, strict=True):
      (first,), (second,) = np.flatnonzero(text == 1), np.flatnonzero(text == 2)
      label = int(first // 5 != second // 5)
      self.assertEqual(target[-1], 8 + label)
      self.assertLess(first // 5, 4)
      self.assertEqual(text[-1], 7)
      seen.add((second - first, label))
    # The flattened distance says nothing of the class.
    self.assertEqual(seen, {(k, label) for k in (2, 3) for label in (0, 1)})
    self.assertTrue((is_asked.sum(axis=1) == 1).all())

  def test_the_box_is_round_the_cells_that_the_word_names(self):
    model = models.Transformer(configs.TransformerConfig())
    task = grid_scenes.Boxes(size=4, batch_size=2, model=model)
    draw = jax.jit(task.draw, static_argnums=1)
    found = jax.tree.map(np.asarray, draw(jax.random.key(0), 100))
    sides = set()
    for text, box, roles in zip(*found, strict=True):
      cells = text[1:-1].reshape(4, 4)
      self.assertEqual(text[-1], 9)
      rows, columns = np.nonzero(cells == text[0] - 4)
      x0, y0 = columns.min(), rows.min()
      x1, y1 = columns.max() + 1, rows.max() + 1
      self.assertLen(rows, (x1 - x0) * (y1 - y0))
      want = [(x0 + x1) / 8, (y0 + y1) / 8, (x1 - x0) / 4, (y1 - y0) / 4]
      np.testing.assert_allclose(box, want)
      sides.add(x0 >= 2)
      named = (cells == text[0] - 4).ravel()
      np.testing.assert_array_equal(roles[1:-1] == grid_scenes.NAMED, named)
      other = (cells > 0).ravel() & ~named
      np.testing.assert_array_equal(roles[1:-1] == grid_scenes.OTHER, other)
      self.assertLen(set(cells[cells > 0].tolist()), 2)
    self.assertLen(sides, 2)

  def test_says_what_would_be_right(self):
    with self.assertRaisesRegex(errors.UserError, "size must be a multiple"):
      grid.GridConfig(size=5)


if __name__ == "__main__":
  absltest.main()
