from absl.testing import absltest
import numpy as np
import pytest

from joma.studies.theories import induction
from tests.joma.studies.theories import small

_KNOWN = {"bigram": 0.9, "unigram": 1.02, "layers set by hand": 0.91}


def _row(first, second):
  """Two runs of ten records, whose layers step up at these."""
  step = lambda at: np.repeat(np.arange(10)[None] >= at, 2, axis=0) * 0.9
  return {"layer 1": step(first), "layer 2": step(second)}


class ClaimsTest(absltest.TestCase):

  def test_waiting_is_the_share_of_records_before_the_bigram(self):
    losses = np.array([
        [1.09, 1.03, 1.01, 1.0, 0.95, 0.91, 1.02],
        [1.09, 0.99, 0.98, 0.97, 0.95, 0.94, 0.93],
    ])
    found = induction.waiting(losses, _KNOWN)
    np.testing.assert_allclose(found, [2 / 5, 0])

  def test_a_layer_is_formed_when_half_the_way_is_gone(self):
    steps = 10 * np.arange(1, 11)
    first, second = induction.halfway(_row(3, 10), steps)
    np.testing.assert_array_equal(first, 40)
    np.testing.assert_array_equal(second, np.inf)

  def test_the_layer_that_forms_first_is_told(self):
    losses = np.full((2, 10), 0.9)
    rows = {
        way: {"loss": losses, **_row(*order)}
        for way, order in zip(
            induction.WAYS, ((5, 3), (3, 5), (3, 5)), strict=True
        )
    }
    told = induction._claims(rows, np.arange(10), _KNOWN)
    it = {row["claim"]: row["it"] for row in told}
    name = "by {} layer 1 forms first, as in the staged algorithm"
    self.assertEqual(it[name.format("SGD")], "FAILED")
    self.assertEqual(it[name.format("Adam")], "holds")
    self.assertEqual(it["SGD waits at the unigram"], "FAILED")
    self.assertEqual(it["two such layers can tell bigrams"], "holds")


class StudyTest(absltest.TestCase):

  @pytest.mark.slow
  def test_stages_train_one_layer_each(self):
    summary = small.measured("induction")
    self.assertLen(summary["claims"], 8)
    staged = {k: np.array(v) for k, v in summary["rows"]["staged"].items()}
    np.testing.assert_array_equal(
        staged["layer 2"][:, 0], staged["layer 2"][:, 1]
    )
    np.testing.assert_array_equal(
        staged["layer 1"][:, 2], staged["layer 1"][:, 3]
    )
    self.assertTrue((np.diff(staged["layer 1"][:, :2]) != 0).all())
    self.assertTrue((np.diff(staged["layer 2"][:, 2:]) != 0).all())

  @pytest.mark.slow
  def test_is_drawn(self):
    figure, texts = small.drawn("induction")
    self.assertLen(figure.axes, 4)
    self.assertContainsSubset(["staged", "layer 1", "loss (nats)"], texts)


if __name__ == "__main__":
  absltest.main()
