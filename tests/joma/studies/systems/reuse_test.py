from absl.testing import absltest
import pytest

from joma.studies.systems import reuse
from joma.studies.systems.subjects import reuse_subject
from scansnap_jax.experiment import errors
from tests.joma.studies.systems import small


class ReuseTest(absltest.TestCase):

  @pytest.mark.slow
  def test_runs_and_is_drawn(self):
    summary = small.measured("reuse")
    self.assertLen(summary["claims"], 6)
    self.assertEqual(set(summary["plans"]), set(reuse.PLANS))
    plans = {name: row["mean"] for name, row in summary["plans"].items()}
    self.assertNotEqual(plans["plan"], plans["dense"])
    figure, texts = small.drawn("reuse")
    self.assertLen(figure.axes, 2)
    self.assertContainsSubset(["HyLRA", "EchoAtt"], texts)

  def test_says_what_would_be_right(self):
    with self.assertRaisesRegex(errors.UserError, "width must be a multiple"):
      reuse_subject.ReuseConfig(width=20)


if __name__ == "__main__":
  absltest.main()
