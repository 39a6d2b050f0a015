from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from scansnap_jax import published
from scansnap_jax.experiment import figures
from scansnap_jax.figures import sparsity
from tests.scansnap_jax.figures import made_up


class Figure6Test(parameterized.TestCase):

  def test_bars_are_sample_deviations_over_seeds(self):
    results = [made_up.medium(num_last) for num_last in (1, 3, 5, 10)]
    panels = sparsity.figure6(results).axes
    looks = figures.curve_styles((0.5, 1.0))
    for axes, result in zip(panels, results, strict=True):
      final = result.history.distinct_entropy[:, -1].astype(np.float64)
      for lr_z, look in looks.items():
        x, mean, spread = made_up.bars(axes, look, is_open=False)
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
    results = [made_up.medium(3), made_up.medium(5)]
    known, unknown = sparsity.figure6(results).axes
    for lr_z, look in figures.curve_styles((0.5, 1.0)).items():
      _, mean, spread = made_up.bars(known, look, is_open=True)
      cells = [published.figure6_cell(3, 6, lr_z, r) for r in (1.0, 2.0, 5.0)]
      np.testing.assert_allclose(mean, [cell.mean for cell in cells])
      np.testing.assert_allclose(spread, [cell.std for cell in cells])
    self.assertLen(known.containers, 4)
    self.assertLen(unknown.containers, 2)
    alone = sparsity.figure6(results[:1], show_published=False)
    self.assertLen(alone.axes[0].containers, 2)

  def test_one_rate_one_ratio_and_one_seed_make_one_point(self):
    result = made_up.medium(4, lr_z=(0.7,), lr_ratio=(3.0,), seeds=(1,))
    (axes,) = sparsity.figure6([result]).axes
    look = figures.curve_styles([float(np.float32(0.7))]).popitem()[1]
    x, mean, spread = made_up.bars(axes, look, is_open=False)
    np.testing.assert_allclose(x, [3.0])
    np.testing.assert_allclose(mean, result.history.distinct_entropy[:, -1])
    np.testing.assert_array_equal(spread, [0])
    labels = [label.get_text() for label in axes.get_xticklabels()]
    self.assertEqual(labels, ["3"])


class RecallTest(parameterized.TestCase):

  @parameterized.parameters(
      (sparsity.figure11, "lr_z", r"$\eta_Z=0.5$", 0.5, 1.0),
      (sparsity.figure12, "lr_ratio", r"$\eta_Y/\eta_Z=5$", 1.0, 5.0),
  )
  def test_curve_counts_distinct_tokens_at_the_other_rate_of_one(
      self, draw, axis, label, lr_z, ratio
  ):
    result = made_up.medium(1)
    (axes,) = draw([result]).axes
    thresholds, recall = made_up.line(axes, label)
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
    result = made_up.result(num_last=4, record=False)
    (axes,) = sparsity.figure11([result]).axes
    low, high = axes.get_xlim()
    self.assertBetween(1 / result.classes.num_tokens, low, high)
    self.assertLess(high / low, 1.5)

  def test_smallest_rate_stands_in_for_one(self):
    result = made_up.medium(1, lr_z=(0.5, 2.0), lr_ratio=(2.0, 5.0))
    eleven, twelve = (
        sparsity.figure11([result]).axes[0],
        sparsity.figure12([result]).axes[0],
    )
    np.testing.assert_array_equal(
        made_up.line(eleven, r"$\eta_Z=0.5$")[1],
        made_up.line(twelve, r"$\eta_Y/\eta_Z=2$")[1],
    )


if __name__ == "__main__":
  absltest.main()
