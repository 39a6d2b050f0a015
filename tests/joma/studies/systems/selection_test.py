from absl.testing import absltest
import numpy as np

from joma.studies.systems import selection
from joma.studies.systems.subjects import selector_choices
from scansnap_jax.experiment import errors
from tests.joma.studies.systems import small


class SelectionTest(absltest.TestCase):

  def test_runs_and_is_drawn(self):
    summary = small.measured("selection")
    kept = {name: rows[0]["mean"] for name, rows in summary["kept"].items()}
    self.assertLess(kept["random"], kept["oracle"])
    for name in selector_choices.systems(16, 6):
      self.assertLessEqual(kept[name], kept["oracle"] + 1e-6)
    self.assertLen(summary["claims"], 5)
    figure, texts = small.drawn("selection")
    self.assertLen(figure.axes, 1)
    self.assertContainsSubset(["oracle", "weight kept"], texts)
    # No selector's bar hides another's, and all stay at their value.
    places = [
        bars.lines[0].get_xdata()[0] for bars in figure.axes[0].containers
    ]
    self.assertLen(set(places), len(summary["kept"]))
    self.assertBetween(max(places) / min(places), 1.01, 2)

  def test_keys_are_alike_over_their_neighbours(self):
    config = selection.SelectionConfig(num_keys=512)
    for near, least, most in ((1, -0.1, 0.1), (16, 0.9, 1.0)):
      _, key = selection.draw_vectors(config, near)
      key = np.asarray(key[:, :, 0])
      alike = (key[:, 4:] * key[:, :-4]).mean() / (key**2).mean()
      self.assertBetween(alike, least, most)

  def test_says_what_would_be_right(self):
    with self.assertRaisesRegex(errors.UserError, "multiple of block=16"):
      selection.SelectionConfig(num_keys=100)


if __name__ == "__main__":
  absltest.main()
