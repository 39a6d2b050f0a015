import dataclasses

from absl.testing import absltest
import numpy as np

from joma.studies.systems.probes import update_rank
from scansnap_jax.experiment import errors
from tests.joma.studies.systems import small

_CONFIG = update_rank.UpdateRankConfig(
    width=3, num_directions=3, rate=0.01, num_steps=300, num_records=300
)


class UpdateRankTest(absltest.TestCase):

  def test_runs_and_is_drawn(self):
    summary = small.measured("update_rank")
    self.assertLen(summary["claims"], 3)
    self.assertEqual(np.shape(summary["rows"]["2"]["times"]), (2, 3))
    figure, texts = small.drawn("update_rank")
    self.assertLen(figure.axes, 2)
    self.assertContainsSubset(["1 matrix", "2 factors"], texts)

  def test_two_factors_follow_the_closed_form(self):
    # Balanced factors a = b = sqrt(u) I of a diagonal target s: du/dt =
    # 2 u (s - u), so that u = s / (1 + (s / u_0 - 1) exp(-2 s t)) (1312.6120).
    start = np.stack([np.sqrt(0.01) * np.eye(3)] * 2)
    values = np.array([4.0, 2.0, 1.0])
    path = update_rank.descend(_CONFIG, start, np.diag(values))
    t = 0.01 * np.arange(1, 301)[:, None]
    wanted = values / (1 + (values / 0.01 - 1) * np.exp(-2 * values * t))
    found = np.einsum("Nij,Nji->Ni", path[:, 1], path[:, 0])
    # Steps of .01 lag behind the flow by some hundredths of their paces.
    np.testing.assert_allclose(found, wanted, atol=0.12)
    early = [update_rank.appears(x) for x in (found / values).T]
    flow = np.log(values / 0.01 - 1) / (2 * values) / 0.01
    np.testing.assert_allclose(early, flow, rtol=0.05)

  def test_a_product_that_was_made_is_read(self):
    # The second factor swaps what the first one has scaled.
    left = np.eye(3)[[1, 0, 2]]
    swap = np.eye(3)[[1, 0, 2]]
    values = np.linspace(4, 1, 3)
    shares = np.array([[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]])
    path = np.stack([[np.diag(x * values), swap] for x in shares])
    start = np.stack([np.zeros((3, 3)), swap])
    found = update_rank._read(_CONFIG, path, start, left, np.eye(3))
    np.testing.assert_allclose(found["held"], shares)
    np.testing.assert_allclose(found["times"], [0.5, 1.5, 2.5])
    self.assertEqual(found["spearman"], 1.0)
    self.assertEqual(found["first_rank"], [1.0, 0.0])

  def test_ranks_are_correlated_and_not_numbers(self):
    one = np.array([1.0, 100.0, 2.0, 3.0])
    # Ranks 0 3 1 2 against 3 2 1 0: 1 - 6 (9 + 1 + 0 + 4) / (4 * 15).
    found = update_rank.spearman(one, np.array([9, 8, 7, 6]))
    self.assertAlmostEqual(found, 1 - 6 * 14 / 60)

  def test_what_does_not_appear_is_said(self):
    with self.assertRaisesRegex(errors.UserError, "more steps"):
      update_rank.appears(np.zeros(4))
    with self.assertRaisesRegex(errors.UserError, "depths"):
      dataclasses.replace(_CONFIG, depths=(1,))


if __name__ == "__main__":
  absltest.main()
