from absl.testing import absltest
import numpy as np
import pytest

from joma.studies.questions import joint_invariant


class MeasureTest(absltest.TestCase):

  @pytest.mark.slow
  def test_exact_laws_hold_to_the_step_and_the_printed_one_does_not(self):
    config = joint_invariant.JointInvariantConfig(
        num_seeds=2,
        num_classes=6,
        hidden_dim=8,
        num_steps=400,
        num_records=4,
        step_size=0.2,
        embedding_step_size=0.1,
    )
    summary = joint_invariant.measure(config)
    self.assertLen(summary["rows"], 6)
    for name, row in summary["rows"].items():
      has_u = name.startswith("embeddings")
      exact = row["embedding" if has_u else "exact"]["mean"][-1]
      self.assertLess(exact, 0.02, name)
      # First order in the step, but for steps over the kink of ReLU.
      slack = 0.1 if has_u else 0.6
      np.testing.assert_allclose(row["step_ratio"]["mean"], 2, atol=slack)
      self.assertGreater(row["relative_error"]["mean"][-1], 5 * exact, name)
      if has_u:
        # v moves with the embeddings too, which the law of v leaves out.
        self.assertGreater(row["exact"]["mean"][-1], 0.2)
    self.assertIn("takes its place", summary["finding"])
    rows = summary["rows"]
    rows["embeddings/random"]["embedding"]["mean"][-1] = 9.0
    self.assertIn("fails as well", joint_invariant._finding(rows))


if __name__ == "__main__":
  absltest.main()
