from absl.testing import absltest
import jax.numpy as jnp
import numpy as np
import pytest

from joma.studies.questions import residual


class MeasureTest(absltest.TestCase):

  @pytest.mark.slow
  def test_the_law_holds_in_the_sum_over_queries_alone(self):
    config = residual.ResidualConfig(
        num_seeds=2,
        num_classes=4,
        num_queries=2,
        hidden_dim=8,
        num_steps=600,
        num_records=2,
    )
    summary = residual.measure(config)
    self.assertLen(summary["rows"], 8)
    for name, row in summary["rows"].items():
      self.assertLess(row["summed_law"]["mean"], 0.03, name)
      if "speaking" in name:
        self.assertGreater(row["single_law"]["mean"], 0.05, name)
      self.assertLess(row["loss"]["mean"][-1], row["loss"]["mean"][0])
    # Without a residual a silent query has no way to be told from another.
    off, on = (
        summary["rows"][f"softmax/silent/{r}"]["distance"]["mean"]
        for r in ("off", "on")
    )
    self.assertLess(off[-1], off[0])
    self.assertLess(off[-1], on[-1])
    costs = {
        name: dict(mean=-1.0, low=-2.0, high=-0.5) for name in summary["costs"]
    }
    slower = residual._finding(summary["rows"], costs)
    self.assertIn("The residual slows down", slower)
    costs = {
        name: dict(mean=1.0, low=0.5, high=2.0) for name in summary["costs"]
    }
    faster = residual._finding(summary["rows"], costs)
    self.assertIn("is learned more slowly", faster)


class QueryDistanceTest(absltest.TestCase):

  def test_by_hand(self):
    # softmax: (1/2, 1/2) and (3/4, 1/4), apart by 1/4.
    logits = jnp.log(jnp.array([[[1.0, 1.0], [3.0, 1.0]]]))
    np.testing.assert_allclose(
        residual.query_distance(logits), [0.25], rtol=1e-6
    )


if __name__ == "__main__":
  absltest.main()
