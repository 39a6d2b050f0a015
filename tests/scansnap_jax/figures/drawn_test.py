import itertools

from absl.testing import absltest
from absl.testing import parameterized
import pytest

from scansnap_jax.figures import attention
from scansnap_jax.figures import sparsity
from scansnap_jax.figures import theory
from tests.scansnap_jax.figures import made_up


class LayoutTest(parameterized.TestCase):

  @parameterized.named_parameters(
      ("3", lambda: made_up.drawn(theory.figure3)),
      ("4", lambda: attention.figure4(made_up.result(lr_ratio=(1.0, 10.0)))),
      ("5", lambda: attention.figure5(made_up.result(lr_z=(0.1, 0.5, 1.0)))),
      ("6", lambda: sparsity.figure6([made_up.medium(n) for n in (1, 3)])),
      ("8", lambda: made_up.drawn(theory.figure8)),
      ("9", lambda: made_up.drawn(theory.figure9)),
      ("11", lambda: sparsity.figure11([made_up.medium(n) for n in (1, 3)])),
  )
  @pytest.mark.by_default(3, 6)
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
