from absl.testing import absltest
import numpy as np
import pytest

from joma.studies.systems import deconstruct
from tests.joma.studies.systems import small


def _row(loss):
  losses = [loss - 0.01, loss, loss + 0.01]
  return {"losses": losses, "loss": {"mean": loss}}


class DeconstructTest(absltest.TestCase):

  @pytest.mark.slow
  def test_runs_and_is_drawn(self):
    summary = small.measured("deconstruct")
    self.assertEqual([*summary["uniform"]], ["standard", "no mixing"])
    self.assertEqual([*summary["hybrid"]], ["no mixing"])
    self.assertEmpty(summary["uniform"]["no mixing"]["probes"])
    standard = summary["uniform"]["standard"]["probes"]
    self.assertBetween(standard["concentration"], 0.5, 1)
    figure, texts = small.drawn("deconstruct")
    self.assertLen(figure.axes, 2)
    self.assertContainsSubset(["in every other layer"], texts)

  def test_the_papers_own_order_holds_and_another_fails(self):
    forms = deconstruct.FORMS
    rows = {
        kind: {
            form: _row(np.log(getattr(known, kind)))
            for form, known in forms.items()
            if getattr(known, kind) is not None
        }
        for kind in ("uniform", "hybrid")
    }
    spearman = {k: deconstruct._spearman(k, v) for k, v in rows.items()}
    np.testing.assert_allclose([*spearman.values()], 1)
    told = deconstruct._claims(rows, spearman)
    self.assertEqual({row["it"] for row in told}, {"holds"})
    rows["uniform"]["standard"] = _row(5.0)
    rows["hybrid"]["fixed"] = _row(6.0)
    spearman = {k: deconstruct._spearman(k, v) for k, v in rows.items()}
    told = [row["it"] for row in deconstruct._claims(rows, spearman)]
    self.assertEqual(told, ["FAILED", *("holds",) * 4, *("FAILED",) * 4])


if __name__ == "__main__":
  absltest.main()
