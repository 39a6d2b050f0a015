from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np

from joma.studies.theories import loss_sparsity
from tests.joma.studies.theories import small

_CONFIG = loss_sparsity.LossSparsityConfig(num_inputs=3, num_tokens=4, width=5)


def _losses(query, read_out, problem):
  """Both losses and the entropy, by loops over tokens."""
  logistic = square = entropy = 0.0
  for tokens, label in zip(*problem, strict=True):
    weights = np.exp(tokens @ query)
    weights /= weights.sum()
    found = sum(
        w * (x @ read_out) for w, x in zip(weights, tokens, strict=True)
    )
    logistic += np.log(1 + np.exp(-label * found)) / 3
    square += (found - label) ** 2 / 2 / 3
    entropy -= (weights * np.log(weights)).sum() / 3
  return logistic, square, entropy


class TrainTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    self.problem = loss_sparsity.draw_problem(_CONFIG, 0)
    self.start = np.random.default_rng(1).normal(size=(2, 5))

  def test_one_token_of_each_input_carries_its_label(self):
    problem = loss_sparsity.draw_problem(
        loss_sparsity.LossSparsityConfig(num_inputs=40), 0
    )
    lengths = np.linalg.norm(problem.inputs, axis=-1)
    place = lengths.argmax(axis=1)
    chosen = problem.inputs[np.arange(40), place]
    np.testing.assert_allclose(lengths.max(axis=1), 5**0.5, rtol=1e-12)
    # All of a label are one vector; those of both labels are 2 apart.
    for label in (-1, 1):
      same = chosen[problem.labels == label]
      np.testing.assert_allclose(same - same[:1], 0, atol=1e-12)
    apart = chosen[problem.labels == 1][0] - chosen[problem.labels == -1][0]
    self.assertAlmostEqual(np.linalg.norm(apart), 2.0)

  def test_a_step_follows_the_slope_and_records_what_is_there(self):
    for which, kind in enumerate(loss_sparsity.LOSSES):
      slope = np.zeros((2, 5))
      for place in np.ndindex(2, 5):
        ends = []
        for sign in (1, -1):
          moved = self.start.copy()
          moved[place] += sign * 1e-5
          ends.append(_losses(*moved, self.problem)[which])
        slope[place] = (ends[0] - ends[1]) / 2e-5
      after = self.start - 0.3 * slope
      want = _losses(*after, self.problem)
      with jax.enable_x64(True):
        problem = loss_sparsity.Problem(*map(jnp.asarray, self.problem))
        names = ("query", "read_out")
        params = dict(zip(names, map(jnp.asarray, self.start), strict=True))
        losses, entropies = loss_sparsity.train(
            params, problem, jnp.array([1, 3]), kind, 0.3
        )
      np.testing.assert_allclose(losses[0], want[which], rtol=1e-8)
      np.testing.assert_allclose(entropies[0], want[2], rtol=1e-8)
      self.assertLess(losses[1], losses[0])


class StudyTest(absltest.TestCase):

  def test_runs_and_is_drawn(self):
    summary = small.measured("loss_sparsity")
    self.assertLen(summary["claims"], 4)
    figure, texts = small.drawn("loss_sparsity")
    self.assertLen(figure.axes, 2)
    self.assertContainsSubset(["logistic", "square", "step"], texts)


if __name__ == "__main__":
  absltest.main()
