from absl.testing import absltest
import numpy as np
import pytest

from joma.studies.systems.bridge import bridge_ladder
from joma.studies.systems.bridge import rungs
from joma.studies.systems.bridge import verdict
from scansnap_jax.experiment import errors
from tests.joma.studies.systems import small


class RungsTest(absltest.TestCase):

  def test_each_changes_one_thing_of_another(self):
    by_name = {rung.name: rung for rung in rungs.RUNGS}
    self.assertLen(by_name, 21)
    for rung in rungs.RUNGS[1:]:
      before = by_name[rung.after]
      changed = {
          field
          for field in rung._fields
          if getattr(rung, field) != getattr(before, field)
      } - {"name", "after"}
      # The rate goes with embeddings and optimizer; alone it is a control.
      self.assertLen(changed - {"rate"} or changed, 1, rung.name)


def _rows(recalls):
  """Rungs with recalls of two seeds, which stay; all else is .25."""
  names = (*verdict._SHOWN, "type", "velocity over size", "sign of velocity")
  rows = {}
  for rung, given in recalls.items():
    fill = lambda name, given=given: np.repeat(
        np.array(given.get(name, (0.25, 0.25)))[:, None], 2, axis=1
    )
    rows[rung] = {
        "recall": {name: fill(name) for name in names},
        "partial": np.zeros((2, 2)),
        "loss": np.ones((2, 2)),
    }
  return rows


class ConcludeTest(absltest.TestCase):

  def test_names_the_rung_with_the_largest_fall(self):
    found = verdict.conclude(
        _rows({
            "Scan & Snap": {"flow": (0.9, 0.8), "velocity": (0.9, 0.9)},
            "2 next tokens": {"flow": (0.8, 0.7), "velocity": (0.3, 0.31)},
            "all next tokens": {"flow": (0.35, 0.3), "velocity": (0.3, 0.31)},
        })
    )
    told = found["verdict"].split("Down the ladder ")[1:]
    self.assertIn("from Scan & Snap to 2 next tokens", told[1])
    self.assertIn("from 0.900 to 0.305, by seed -0.595", told[1])
    self.assertIn("from 2 next tokens to all next tokens", told[2])
    # Seeds in pairs: -.45 and -.4, so that t(1) = 12.706 gives a half of .318.
    self.assertIn("by seed -0.425 [-0.743, -0.107]", told[2])
    row = found["table"][2]
    self.assertAlmostEqual(row["change of flow, last"]["mean"], -0.425)

  @pytest.mark.slow
  def test_claims_are_differences_by_seed(self):
    found = verdict.conclude(
        _rows({
            "Scan & Snap": {"velocity": (0.9, 0.8), "frequency": (0.85, 0.75)},
            "2 next tokens": {"flow": (0.9, 0.2), "frequency": (0.1, 0.1)},
        })
    )
    it = [row["it"] for row in found["claims"]]
    self.assertEqual(it, ["holds", "FAILED", "holds", "FAILED"])


class LadderTest(absltest.TestCase):

  @pytest.mark.slow
  def test_runs_and_is_drawn(self):
    summary = small.measured("bridge_ladder")
    self.assertLen(summary["claims"], 6)
    self.assertEqual(summary["chance"], 0.25)
    for row in summary["rows"].values():
      self.assertEqual(np.shape(row["recall"]["flow"]), (2, 2))
    figure, texts = small.drawn("bridge_ladder")
    self.assertLen(figure.axes, 2)
    self.assertContainsSubset(["settled velocity", "flow", "step 4"], texts)

  def test_says_what_would_be_right(self):
    with self.assertRaisesRegex(errors.UserError, "rungs must be from 2 to 21"):
      bridge_ladder.BridgeLadderConfig(rungs=1)


if __name__ == "__main__":
  absltest.main()
