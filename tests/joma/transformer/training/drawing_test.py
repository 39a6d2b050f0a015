import json
import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
import pytest

from joma.transformer.training import drawing
from joma.transformer.training import summary
from scansnap_jax.experiment import figures
from tests.joma.transformer.training.made import lm_runs


def _heights(axes):
  """Heights of all lines of some length, as tuples."""
  return {
      tuple(np.round(np.asarray(line.get_ydata(), float), 9))
      for line in axes.get_lines()
  }


def _rounded(values):
  return tuple(np.round([value for value in values if value is not None], 9))


class PlotLmTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    path = self.folder / "reference.csv"
    lm_runs.write_reference(path)
    self.reference = summary.read_reference(path)

  def _groups(self, runs):
    groups = summary.group_runs(runs, self.reference)
    return json.loads(json.dumps(groups))  # As read back.

  def test_losses_of_both_texts_and_of_the_authors_are_drawn(self):
    groups = self._groups([lm_runs.make_run()])
    figure = drawing.losses(groups)
    heights = _heights(figure.axes[0])
    self.assertIn(_rounded(groups[0]["valid_loss"]["mean"]), heights)
    self.assertIn(_rounded(groups[0]["train_loss"]["mean"]), heights)
    self.assertIn((9.0, 8.0, 7.0), heights)

  def test_perplexities_are_exponentials_of_the_losses(self):
    (axes,) = drawing.losses(self._groups([lm_runs.make_run()])).axes
    (right,) = axes.child_axes
    figure = axes.get_figure()
    figure.draw_without_rendering()
    ticks = right.get_yticks()
    self.assertNotEmpty(ticks)
    for tick in ticks:
      left = axes.transData.transform((0, np.log(tick)))[1]
      self.assertAlmostEqual(right.transData.transform((0, tick))[1], left, 3)

  def test_a_narrow_range_of_losses_has_perplexities_too(self):
    axes = figures.make_figure(3, 3).subplots()
    axes.set_ylim(5.83, 6.31)  # 340 to 550.
    drawing._add_perplexities(axes)
    (right,) = axes.child_axes
    self.assertEqual(right.get_yticks().tolist(), [350, 400, 450, 500, 550])

  def test_entropy_has_a_panel_a_group_and_a_curve_a_layer(self):
    runs = [
        lm_runs.make_run(num_layers=n, seed=seed)
        for n in (1, 2)
        for seed in (1, 2)
    ]
    groups = self._groups(runs)
    panels = drawing.entropy(groups).axes
    self.assertLen(panels, 2)
    for axes, group in zip(panels, groups, strict=True):
      for curve in group["entropy"]["mean"]:
        self.assertIn(_rounded(curve), _heights(axes))
      self.assertIn((2.0, 1.75, 1.5), _heights(axes))
      self.assertLen(axes.collections, group["num_layers"])  # The bands.
    self.assertEqual(panels[1].get_title(), "2 layers")
    self.assertEqual(
        panels[1].texts[0].get_text(), "loss 4.875 @ 2k (authors 7.000 @ 2k)"
    )

  def test_the_entropy_of_one_sequence_is_dashed(self):
    (axes,) = drawing.entropy(
        self._groups([lm_runs.make_run(num_layers=1, with_chunk=True)])
    ).axes
    (dashed,) = [line for line in axes.lines if line.get_linestyle() == "--"]
    self.assertEqual(dashed.get_label(), "one sequence")
    self.assertEqual(dashed.get_ydata()[0], 2.25)

  def test_of_many_points_of_the_authors_the_least_is_kept(self):
    path = self.folder / "long.csv"
    entropy = [2.0] * 60
    entropy[7] = 1.0
    rows = [f"1,0.0001,1,{i}000,7,{e}," for i, e in enumerate(entropy)]
    path.write_text("\n".join([lm_runs.HEADER, *rows]) + "\n")
    runs = [lm_runs.make_run(num_layers=1, steps=range(0, 60_000, 1000))]
    groups = summary.group_runs(runs, summary.read_reference(path))
    (axes,) = drawing.entropy(groups).axes
    points = {len(line.get_xdata()): line for line in axes.get_lines()}[13]
    self.assertIn((7000, 1.0), list(map(tuple, points.get_xydata())))

  def test_a_layer_has_one_colour_in_all_panels(self):
    runs = [lm_runs.make_run(num_layers=n) for n in (2, 3)]
    colors = [
        {line.get_label(): line.get_color() for line in axes.get_lines()}
        for axes in drawing.entropy(self._groups(runs)).axes
    ]
    for layer in ("layer 0", "layer 1"):
      self.assertEqual(colors[0][layer], colors[1][layer])
    self.assertNotEqual(colors[1]["layer 1"], colors[1]["layer 2"])

  def test_probes_are_drawn_by_layer(self):
    (group,) = self._groups([lm_runs.make_run()])
    panels = drawing.probes(group).axes
    for axes, name in zip(
        panels, ("sink_rate", "effective_support", "stable_rank"), strict=True
    ):
      for curve in group[name]["mean"]:
        self.assertIn(_rounded(curve), _heights(axes))

  def test_final_entropy_is_drawn_by_rate(self):
    runs = [
        lm_runs.make_run(lr=lr, seed=seed)
        for lr in (1e-4, 1e-3)
        for seed in (1, 2)
    ]
    groups = self._groups(runs)
    points = drawing.final_entropies(groups, 2)
    self.assertEqual([point["lr"] for point in points], [1e-4, 1e-3])
    self.assertAlmostEqual(points[0]["mean"], 2.25)
    self.assertAlmostEqual(points[0]["std"], np.std([0.1, 0.2], ddof=1))
    self.assertAlmostEqual(points[0]["authors"], (1.5 + 1.75) / 2)
    self.assertIsNone(points[1]["authors"])
    (axes,) = drawing.final_entropy(groups).axes
    self.assertIn(_rounded(p["mean"] for p in points), _heights(axes))
    self.assertEqual(axes.get_xscale(), "log")

  def test_maps_show_what_a_query_sees(self):
    maps = lm_runs.make_maps(3)
    figure = drawing.maps(maps, [0, 500, 1000])
    panels = [axes for axes in figure.axes if axes.images]
    self.assertLen(panels, 6)
    titles = [axes.get_title() for axes in panels[:3]]
    self.assertEqual(
        titles, ["minibatch 0", "minibatch 500", "minibatch 1,000"]
    )
    shown = panels[4].images[0].get_array()
    np.testing.assert_array_equal(shown.mask, np.triu(np.ones((6, 6)), 1) > 0)
    np.testing.assert_array_equal(np.tril(shown.filled(0)), maps[1, 1, 0])

  def test_tokens_stand_beside_maps_where_there_is_room(self):
    tokens = ["a", " b", "\n", "$x$", "long token", "\x00"]
    shown = ["a", "\u2423b", "\u21b5", r"\$x\$", "long\u2423to\u2026", "\ufffd"]
    for count, want in ((1, shown), (20, None)):
      maps = np.repeat(lm_runs.make_maps(1), count, axis=0)
      figure = drawing.maps(maps, range(count), tokens=tokens)
      panels = [axes for axes in figure.axes if axes.images]
      axes = panels[-count]  # Below, on the left.
      for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        texts = [label.get_text() for label in labels]
        (self.assertEqual if want else self.assertNotEqual)(texts, shown)

  def test_of_many_heads_some_are_shown(self):
    self.assertEqual(drawing.shown_maps(4, 4), [(0, 0), (1, 1), (2, 2), (3, 3)])
    self.assertEqual(drawing.shown_maps(1, 2), [(0, 0), (0, 1)])

  @parameterized.parameters(
      (1e-4, "1e-4"), (2.5e-6, "2.5e-6"), (0.01, "0.01"), (5.0, "5")
  )
  def test_rates_are_short(self, lr, expected):
    (group,) = self._groups([lm_runs.make_run(lr=lr)])
    self.assertEqual(
        drawing.describe(group, [group]), f"2 layers, lr {expected}"
    )

  @pytest.mark.slow
  def test_figures_are_written(self):
    groups = self._groups([lm_runs.make_run(steps=range(0, 30_001, 500))])
    for name, figure in (
        ("losses", drawing.losses(groups)),
        ("maps", drawing.maps(lm_runs.make_maps(), [0, 1, 2, 3])),
    ):
      for path in figures.save(figure, self.folder, name):
        self.assertGreater(path.stat().st_size, 5000)

  def test_the_start_of_a_long_run_is_cut_off(self):
    run = lm_runs.make_run(steps=range(0, 30_001, 500))
    run["valid_loss"][0] = 1000.0
    (axes,) = drawing.losses(self._groups([run])).axes
    low, high = axes.get_ylim()
    self.assertLess(high, 10)
    self.assertLess(low, min(run["valid_loss"]))
    short = lm_runs.make_run(steps=range(0, 3001, 500))
    short["valid_loss"][0] = 1000.0
    (axes,) = drawing.losses(self._groups([short])).axes
    self.assertGreater(axes.get_ylim()[1], 1000)


if __name__ == "__main__":
  absltest.main()
