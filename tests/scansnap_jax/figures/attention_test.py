import itertools

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from scansnap_jax import published
from scansnap_jax.figures import attention
from tests.scansnap_jax.figures import made_up


class Figure4Test(parameterized.TestCase):

  def test_heat_maps_show_the_smallest_seed_group_by_group(self):
    result = made_up.result(lr_ratio=(1.0, 10.0))
    maps = made_up.heat_maps(attention.figure4(result))
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
    result = made_up.result(record=False)
    first, _ = made_up.heat_maps(attention.figure4(result))
    self.assertEqual(first.images[0].get_array().shape, (30, 1))

  def test_many_settings_take_several_rows(self):
    result = made_up.result(lr_z=(0.5, 1.0), lr_ratio=(1.0, 2.0))
    self.assertLen(made_up.heat_maps(attention.figure4(result)), 8)

  def test_curves_are_means_over_the_runs_of_a_setting(self):
    result = made_up.result(lr_ratio=(1.0, 10.0))
    figure = attention.figure4(result)
    own = result.runs.lr_ratio == 10
    for title, curves in (
        ("batch loss", result.history.losses),
        ("entropy over distinct tokens", result.history.distinct_entropy),
        ("attention on common tokens", result.history.common_mass),
    ):
      _, mean = made_up.line(
          made_up.panel(figure, title), r"$\eta_Z=1,\ \eta_Y=10$"
      )
      np.testing.assert_allclose(mean, curves[own].mean(axis=0), rtol=1e-6)
    self.assertEqual(made_up.panel(figure, "batch loss").get_yscale(), "log")

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
    figure = attention.figure4(made_up.result(**setting), **switch)
    containers = made_up.panel(figure, "batch loss").containers
    self.assertLen(containers, int(expected))
    if expected:
      line = containers[0].lines[0]
      drawn = dict(zip(line.get_xdata(), line.get_ydata(), strict=True))
      self.assertEqual(drawn, dict(published.FIGURE4_LOSSES))

  def test_flow_is_drawn_for_the_ratios_of_the_runs(self):
    steps = np.linspace(0, 20, 5)
    flow = {r: (steps, 2 - steps / r, steps / r) for r in (0.1, 10.0, 99.0)}
    result = made_up.result(lr_ratio=(0.1, 10.0))
    figure = attention.figure4(result, flow)
    for title, index in (
        ("entropy over distinct tokens", 1),
        ("attention on common tokens", 2),
    ):
      lines = made_up.lines(made_up.panel(figure, title), "gradient flow")
      self.assertLen(lines, 2)
      for line, ratio in zip(lines, (0.1, 10.0), strict=True):
        np.testing.assert_array_equal(line.get_ydata(), flow[ratio][index])


class Figure5Test(parameterized.TestCase):

  def test_authors_losses_under_sgd_do_not_appear(self):
    figure = attention.figure5(made_up.result(lr_z=(0.1, 0.5, 1.0)))
    self.assertLen(made_up.heat_maps(figure), 6)
    self.assertEmpty(made_up.panel(figure, "batch loss").containers)

  def test_sgds_flow_is_named_so(self):
    flow = {
        1.0: (np.array([0, 20]), np.array([2.1, 1.9]), np.array([0.6, 0.4]))
    }
    figure = attention.figure5(made_up.result(lr_z=(0.1, 0.5)), flow)
    panel = made_up.panel(figure, "entropy over distinct tokens")
    (line,) = (l for l in panel.lines if l.get_label() == "SGD, flow")
    np.testing.assert_array_equal(line.get_ydata(), [2.1, 1.9])


if __name__ == "__main__":
  absltest.main()
