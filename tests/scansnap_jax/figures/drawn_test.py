import functools
import itertools
import math

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from scansnap_jax import config as config_lib
from scansnap_jax import data
from scansnap_jax import published
from scansnap_jax import run as run_lib
from scansnap_jax import train
from scansnap_jax.experiment import figures
from scansnap_jax.figures import attention
from scansnap_jax.figures import sparsity
from scansnap_jax.figures import theory

# Float32 against float64: ten times the largest error seen.
_RTOL = 2e-5
_SEEDS = (7, 3, 5)

_theory = functools.cache(lambda draw: draw())


def _result(
    num_last=2,
    num_next_per_last=1,
    lr_z=(1.0,),
    lr_ratio=(1.0,),
    seeds=_SEEDS,
    steps=(0, 2, 3, 4, 6, 8, 10, 12, 20),
    record=True,
):
  """A result with the right shapes and P(l|n), and made-up curves."""
  classes = data.make_classes(
      config_lib.DataConfig(num_next_per_last=num_next_per_last), num_last
  )
  runs = [*itertools.product(seeds, lr_z, lr_ratio)]
  seed, z, ratio = (np.array(axis) for axis in zip(*runs, strict=True))
  random = np.random.default_rng(0)
  shape = (len(runs), len(steps) if record else 1, *classes.probs.shape)
  attended = classes.probs * random.gamma(2.0, size=shape)
  attended /= attended.sum(axis=-1, keepdims=True)
  curve = lambda low, high, num: random.uniform(low, high, (len(runs), num))
  history = train.History(
      losses=curve(1e-5, 1, steps[-1]).astype(np.float32),
      distinct_entropy=curve(1.5, 2.1, len(steps)).astype(np.float32),
      common_mass=curve(0.3, 0.6, len(steps)).astype(np.float32),
      attended=attended.astype(np.float32),
  )
  return train.Result(
      num_last=num_last,
      classes=classes,
      runs=run_lib.SweepRun(
          seed=seed.astype(np.uint32),
          stream=np.searchsorted(np.sort(seeds), seed).astype(np.int32),
          lr_z=z,
          lr_ratio=ratio,
      ),
      steps=np.array(steps),
      history=history,
      params={},
  )


def _medium(num_last, lr_z=(0.5, 1.0), lr_ratio=(1.0, 2.0, 5.0), seeds=_SEEDS):
  return _result(num_last, 2, lr_z, lr_ratio, seeds, (0, 20), record=False)


def _h(t, num_tokens, eta_y):
  """Solves e^{M h} + (M - 1) M h = M eta_y t + 1 by bisection, in float64."""
  low, high = np.zeros_like(t), np.full_like(t, 40.0)
  for _ in range(80):
    x = (low + high) / 2
    above = np.exp(x) + (num_tokens - 1) * x > num_tokens * eta_y * t + 1
    low, high = np.where(above, low, x), np.where(above, x, high)
  return np.where(t > 0, x, 0) / num_tokens


def _snapping_start(num_tokens, num_classes, eta_y):
  """Solves Lemma 8 for u = (1 + omega_1) ln M by fixed-point iteration."""
  u = 2 * math.log(num_tokens)
  for _ in range(200):
    u = math.log(u * (num_tokens - 1))
  return 2 * u * num_classes / eta_y


def _lines(axes, label):
  return [line for line in axes.lines if line.get_label() == label]


def _line(axes, label):
  (line,) = _lines(axes, label)
  return line.get_xdata(), np.asarray(line.get_ydata())


def _bars(axes, look, is_open):
  """Points (x, mean, spread) of a curve with error bars."""
  (bar,) = [
      bar
      for bar in axes.containers
      if bar.lines[0].get_marker() == look.marker
      and (bar.lines[0].get_markerfacecolor() == "white") == is_open
  ]
  points, _, (segments,) = bar.lines
  ends = np.array(segments.get_segments())
  spread = (ends[:, 1, 1] - ends[:, 0, 1]) / 2
  return points.get_xdata(), points.get_ydata(), spread


def _heat_maps(figure):
  return [
      axes
      for axes in figure.axes
      if axes.images and axes.get_label() != "<colorbar>"
  ]


def _panel(figure, title):
  (axes,) = [axes for axes in figure.axes if axes.get_title() == title]
  return axes


class Figure3Test(parameterized.TestCase):

  def test_curves_are_theorem_4_from_an_independent_h(self):
    (axes,) = _theory(theory.figure3).axes
    for eta_y in (0.5, 1.0, 2.0, 5.0):
      t, chi = _line(axes, rf"$\eta_Y={eta_y:g}$")
      h = _h(np.asarray(t, np.float64) / 10, 1000, eta_y)
      expected = np.sqrt(1 + 2 * (0.5 / eta_y) * 10 * (999 * h) ** 2)
      np.testing.assert_allclose(chi, expected, rtol=_RTOL)
      self.assertEqual((t[0], t[-1], chi[0]), (0, 700, 1))

  def test_dashes_stand_where_attention_snaps(self):
    (axes,) = _theory(theory.figure3).axes
    for eta_y, look in figures.curve_styles((0.5, 1.0, 2.0, 5.0)).items():
      expected = _snapping_start(1000, 10, eta_y)
      (line,) = [
          line
          for line in axes.lines
          if len(line.get_xdata()) == 2 and line.get_color() == look.color
      ]
      np.testing.assert_allclose(line.get_xdata(), expected, rtol=1e-6)

  def test_caption_says_that_the_scale_is_unknown(self):
    self.assertRegex(theory.CAPTIONS["figure3"], "C_0.*cannot be pinned")


class Figure4Test(parameterized.TestCase):

  def test_heat_maps_show_the_smallest_seed_group_by_group(self):
    result = _result(lr_ratio=(1.0, 10.0))
    maps = _heat_maps(attention.figure4(result))
    self.assertLen(maps, 4)
    # Tokens 0-9 common, 10-19 and 20-29 distinct, already rarest first.
    for axes, (ratio, n) in zip(
        maps, itertools.product((1, 10), (0, 1)), strict=True
    ):
      (run,) = np.flatnonzero(
          (result.runs.seed == 3) & (result.runs.lr_ratio == ratio)
      )
      shown = axes.images[0].get_array()
      expected = result.history.attended[run][[0, 1, 3, 4, 5, 6, -1], n, :30].T
      mine = np.r_[0:10, 10 + 10 * n : 20 + 10 * n]
      np.testing.assert_array_equal(shown[mine], expected[mine])
      np.testing.assert_array_equal(
          shown.mask.any(axis=1), np.isin(np.arange(30), mine, invert=True)
      )
      labels = [label.get_text() for label in axes.get_xticklabels()]
      self.assertEqual(labels, ["0", "", "4", "", "8", "", "20"])
      self.assertEqual(axes.get_title(), f"\nclass {n + 1}")
    self.assertLen({axes.images[0].get_clim() for axes in maps}, 1)

  def test_last_attention_alone_is_one_column(self):
    result = _result(record=False)
    first, _ = _heat_maps(attention.figure4(result))
    self.assertEqual(first.images[0].get_array().shape, (30, 1))

  def test_many_settings_take_several_rows(self):
    result = _result(lr_z=(0.5, 1.0), lr_ratio=(1.0, 2.0))
    self.assertLen(_heat_maps(attention.figure4(result)), 8)

  def test_curves_are_means_over_the_runs_of_a_setting(self):
    result = _result(lr_ratio=(1.0, 10.0))
    figure = attention.figure4(result)
    own = result.runs.lr_ratio == 10
    for title, curves in (
        ("batch loss", result.history.losses),
        ("entropy over distinct tokens", result.history.distinct_entropy),
        ("attention on common tokens", result.history.common_mass),
    ):
      _, mean = _line(_panel(figure, title), r"$\eta_Z=1,\ \eta_Y=10$")
      np.testing.assert_allclose(mean, curves[own].mean(axis=0), rtol=1e-6)
    self.assertEqual(_panel(figure, "batch loss").get_yscale(), "log")

  @parameterized.named_parameters(
      ("the_papers", dict(), dict(), True),
      ("other_ratio", dict(lr_ratio=(10.0,)), dict(), False),
      ("other_rate", dict(lr_z=(0.5,)), dict(), False),
      ("other_data", dict(num_last=3), dict(), False),
      ("not_wanted", dict(), dict(show_published=False), False),
  )
  def test_authors_losses_are_drawn_where_they_belong(
      self, setting, switch, expected
  ):
    figure = attention.figure4(_result(**setting), **switch)
    containers = _panel(figure, "batch loss").containers
    self.assertLen(containers, int(expected))
    if expected:
      line = containers[0].lines[0]
      drawn = dict(zip(line.get_xdata(), line.get_ydata(), strict=True))
      self.assertEqual(drawn, dict(published.FIGURE4_LOSSES))

  def test_flow_is_drawn_for_the_ratios_of_the_runs(self):
    steps = np.linspace(0, 20, 5)
    flow = {r: (steps, 2 - steps / r, steps / r) for r in (0.1, 10.0, 99.0)}
    result = _result(lr_ratio=(0.1, 10.0))
    figure = attention.figure4(result, flow)
    for title, index in (
        ("entropy over distinct tokens", 1),
        ("attention on common tokens", 2),
    ):
      lines = _lines(_panel(figure, title), "gradient flow")
      self.assertLen(lines, 2)
      for line, ratio in zip(lines, (0.1, 10.0), strict=True):
        np.testing.assert_array_equal(line.get_ydata(), flow[ratio][index])


class Figure5Test(parameterized.TestCase):

  def test_authors_losses_under_sgd_do_not_appear(self):
    figure = attention.figure5(_result(lr_z=(0.1, 0.5, 1.0)))
    self.assertLen(_heat_maps(figure), 6)
    self.assertEmpty(_panel(figure, "batch loss").containers)


class Figure6Test(parameterized.TestCase):

  def test_bars_are_sample_deviations_over_seeds(self):
    results = [_medium(num_last) for num_last in (1, 3, 5, 10)]
    panels = sparsity.figure6(results).axes
    looks = figures.curve_styles((0.5, 1.0))
    for axes, result in zip(panels, results, strict=True):
      final = result.history.distinct_entropy[:, -1].astype(np.float64)
      for lr_z, look in looks.items():
        x, mean, spread = _bars(axes, look, is_open=False)
        for i, ratio in enumerate((1.0, 2.0, 5.0)):
          own = (result.runs.lr_z == lr_z) & (result.runs.lr_ratio == ratio)
          values = final[own]
          self.assertLen(values, 3)
          variance = ((values - values.mean()) ** 2).sum() / 2
          np.testing.assert_allclose(mean[i], values.mean())
          np.testing.assert_allclose(spread[i], np.sqrt(variance))
        np.testing.assert_allclose(x, [1, 2, 5], rtol=0.1)
    self.assertLen({axes.get_ylim() for axes in panels}, 1)

  def test_authors_points_are_those_of_the_setting(self):
    results = [_medium(3), _medium(5)]
    known, unknown = sparsity.figure6(results).axes
    for lr_z, look in figures.curve_styles((0.5, 1.0)).items():
      _, mean, spread = _bars(known, look, is_open=True)
      cells = [published.figure6_cell(3, 6, lr_z, r) for r in (1.0, 2.0, 5.0)]
      np.testing.assert_allclose(mean, [cell.mean for cell in cells])
      np.testing.assert_allclose(spread, [cell.std for cell in cells])
    self.assertLen(known.containers, 4)
    self.assertLen(unknown.containers, 2)
    alone = sparsity.figure6(results[:1], show_published=False)
    self.assertLen(alone.axes[0].containers, 2)

  def test_one_rate_one_ratio_and_one_seed_make_one_point(self):
    result = _medium(4, lr_z=(0.7,), lr_ratio=(3.0,), seeds=(1,))
    (axes,) = sparsity.figure6([result]).axes
    look = figures.curve_styles([float(np.float32(0.7))]).popitem()[1]
    x, mean, spread = _bars(axes, look, is_open=False)
    np.testing.assert_allclose(x, [3.0])
    np.testing.assert_allclose(mean, result.history.distinct_entropy[:, -1])
    np.testing.assert_array_equal(spread, [0])
    labels = [label.get_text() for label in axes.get_xticklabels()]
    self.assertEqual(labels, ["3"])


class Figure8Test(parameterized.TestCase):

  @parameterized.parameters(
      (0, 50, (0.1, 0.2, 0.5, 1.0, 2.0), 80),
      (1, 1000, (0.2, 0.5, 1.0, 2.0, 4.0), 70),
  )
  def test_steps_follow_the_recursion_and_curves_the_root(
      self, panel, num_tokens, rates, end
  ):
    axes = _theory(theory.figure8).axes[panel]
    smooth = [line for line in axes.lines if line.get_color() == "black"]
    for eta_y, curve in zip(rates, smooth, strict=False):
      s, steps = _line(axes, rf"$\eta_Y={eta_y:g}$")
      h = [0.0]
      for _ in range(end):
        others = num_tokens - 1
        h.append(h[-1] + eta_y / (others + math.exp(num_tokens * h[-1])))
      np.testing.assert_allclose(steps, h, rtol=_RTOL)
      np.testing.assert_array_equal(s, np.arange(end + 1))
      t = np.asarray(curve.get_xdata(), np.float64)
      self.assertEqual((t[0], t[-1]), (0, end))
      expected = _h(t, num_tokens, eta_y)
      np.testing.assert_allclose(curve.get_ydata(), expected, rtol=_RTOL)
    self.assertLen(smooth, len(rates) + 1)  # And the legend's.


class Figure9Test(parameterized.TestCase):

  # Values at the right end, to three digits, for K = 1 and C0 = 1.
  @parameterized.parameters(
      (0, 10, 100, (0.620, 0.671, 0.713, 0.749, 0.783)),
      (1, 1, 10_000, (1.408, 1.450, 1.481, 1.509, 1.533)),
  )
  def test_curves_are_theorem_4_and_markers_stand_at_t0(
      self, panel, ratio, num_tokens, ends
  ):
    axes = _theory(theory.figure9).axes[panel]
    heights = []
    for eta_z, end in zip((0.5, 1.0, 2.0, 4.0, 8.0), ends, strict=True):
      (line,) = _lines(axes, rf"$\eta_Z={eta_z:g}$")
      np.testing.assert_allclose(line.get_ydata()[-1], end, atol=6e-4)
      t = np.asarray(line.get_xdata(), np.float64)
      h = _h(t, num_tokens, ratio * eta_z)
      expected = np.log1p(2 / ratio * ((num_tokens - 1) * h) ** 2) / 4
      np.testing.assert_allclose(line.get_ydata(), expected, rtol=_RTOL)
      (marked,) = line.get_markevery()
      np.testing.assert_allclose(
          line.get_xdata()[marked],
          _snapping_start(num_tokens, 1, ratio * eta_z),
          rtol=1e-6,
      )
      heights.append(line.get_ydata()[marked])
      self.assertTrue((np.diff(line.get_xdata()) >= 0).all())
    # B_n(t0) depends on K, M and eta_Y / eta_Z alone.
    np.testing.assert_allclose(heights, heights[0], rtol=_RTOL)


class RecallTest(parameterized.TestCase):

  @parameterized.parameters(
      (sparsity.figure11, "lr_z", r"$\eta_Z=0.5$", 0.5, 1.0),
      (sparsity.figure12, "lr_ratio", r"$\eta_Y/\eta_Z=5$", 1.0, 5.0),
  )
  def test_curve_counts_distinct_tokens_at_the_other_rate_of_one(
      self, draw, axis, label, lr_z, ratio
  ):
    result = _medium(1)
    (axes,) = draw([result]).axes
    thresholds, recall = _line(axes, label)
    np.testing.assert_allclose(thresholds[[0, -1]], [0.028, 0.038])
    self.assertTrue((np.diff(recall) <= 0).all())
    own = (result.runs.lr_z == lr_z) & (result.runs.lr_ratio == ratio)
    counts = [
        (c[n, classes] > threshold).mean()
        for threshold in thresholds
        for c in result.history.attended[own, -1]
        for n, classes in enumerate(result.classes.is_distinct)
    ]
    expected = np.reshape(counts, (len(thresholds), -1)).mean(axis=1)
    np.testing.assert_allclose(recall, expected, rtol=1e-6)
    num_curves = len(np.unique(getattr(result.runs, axis)))
    self.assertLen(axes.lines, num_curves)

  def test_other_numbers_of_tokens_get_thresholds_near_their_inverse(self):
    result = _result(num_last=4, record=False)
    (axes,) = sparsity.figure11([result]).axes
    low, high = axes.get_xlim()
    self.assertBetween(1 / result.classes.num_tokens, low, high)
    self.assertLess(high / low, 1.5)

  def test_smallest_rate_stands_in_for_one(self):
    result = _medium(1, lr_z=(0.5, 2.0), lr_ratio=(2.0, 5.0))
    eleven, twelve = (
        sparsity.figure11([result]).axes[0],
        sparsity.figure12([result]).axes[0],
    )
    np.testing.assert_array_equal(
        _line(eleven, r"$\eta_Z=0.5$")[1],
        _line(twelve, r"$\eta_Y/\eta_Z=2$")[1],
    )


class LayoutTest(parameterized.TestCase):

  @parameterized.named_parameters(
      ("3", lambda: _theory(theory.figure3)),
      ("4", lambda: attention.figure4(_result(lr_ratio=(1.0, 10.0)))),
      ("5", lambda: attention.figure5(_result(lr_z=(0.1, 0.5, 1.0)))),
      ("6", lambda: sparsity.figure6([_medium(n) for n in (1, 3)])),
      ("8", lambda: _theory(theory.figure8)),
      ("9", lambda: _theory(theory.figure9)),
      ("11", lambda: sparsity.figure11([_medium(n) for n in (1, 3)])),
  )
  def test_nothing_overlaps_and_every_axis_is_named(self, draw):
    figure = draw()
    figure.draw_without_rendering()
    outside = [
        legend for part in (figure, *figure.subfigs) for legend in part.legends
    ]
    for axes in figure.axes:
      frame = axes.get_window_extent()
      for legend in outside:
        self.assertFalse(legend.get_window_extent().overlaps(frame))
      if axes.get_label() != "<colorbar>":
        self.assertNotEmpty(axes.get_xlabel())
      for axis in (axes.xaxis, axes.yaxis):
        labels = [
            label.get_window_extent()
            for label in axis.get_ticklabels()
            if label.get_visible() and label.get_text()
        ]
        for a, b in itertools.pairwise(labels):
          self.assertFalse(a.overlaps(b), f"{axes.get_title()!r} {a} {b}")
    self.assertNotEmpty(figure.axes[0].get_ylabel())

  def test_every_figure_has_a_caption(self):
    for module in (attention, sparsity, theory):
      drawn = [
          n for n in dir(module) if n.startswith("figure") and n[-1:].isdigit()
      ]
      self.assertEqual(sorted(drawn), sorted(module.CAPTIONS))


if __name__ == "__main__":
  absltest.main()
