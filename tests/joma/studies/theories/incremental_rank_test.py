from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np

from joma.studies.theories import incremental_rank
from scansnap_jax.experiment import errors
from tests.joma.studies.theories import small


class FlowTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    rng = np.random.default_rng(0)
    self.inputs = rng.normal(size=(2, 3, 2))
    self.weights = rng.normal(size=(4, 2))

  def _attended(self, weights):
    """The layer by loops over tokens."""
    key, query, value, output = weights
    out = np.zeros((2, 3, 2))
    for b in range(2):
      for t in range(3):
        logits = [
            (self.inputs[b, t] * key * query * self.inputs[b, s]).sum()
            for s in range(3)
        ]
        attn_weights = np.exp(logits) / np.exp(logits).sum()
        for s in range(3):
          out[b, t] += attn_weights[s] * self.inputs[b, s] * value * output
    return out

  def test_the_layer_is_attention_with_diagonal_matrices(self):
    with jax.enable_x64(True):
      weights = incremental_rank.Weights(*map(jnp.asarray, self.weights))
      found = incremental_rank.attend(weights, jnp.asarray(self.inputs))
    np.testing.assert_allclose(found, self._attended(self.weights), rtol=1e-12)

  def test_a_step_goes_down_the_slope_of_the_loss(self):
    targets = self._attended(self.weights + 0.5)
    loss = lambda w: ((self._attended(w) - targets) ** 2).sum() / 6 / 2
    slope = np.zeros((4, 2))
    for place in np.ndindex(4, 2):
      up, down = self.weights.copy(), self.weights.copy()
      up[place] += 1e-5
      down[place] -= 1e-5
      slope[place] = (loss(up) - loss(down)) / 2e-5
    moved = self.weights - 0.1 * slope
    with jax.enable_x64(True):
      start = incremental_rank.Weights(*map(jnp.asarray, self.weights))
      found = incremental_rank.flow(
          start, jnp.asarray(self.inputs), jnp.asarray(targets), 0.1, 1
      )
    want = np.append(moved[0] * moved[1], moved[2] * moved[3])
    np.testing.assert_allclose(found[0], want, rtol=1e-7)

  def test_half_times_count_steps(self):
    curve = np.array([[0.1, 0.0], [0.4, 0.1], [0.6, 0.4], [1.0, 1.1]])
    found = incremental_rank.half_times(curve, np.array([1.0, 2.0]), 0.5)
    np.testing.assert_allclose(found, [1.5, 2.0])
    with self.assertRaisesRegex(errors.UserError, "after num_steps=4"):
      incremental_rank.half_times(curve, np.array([3.0, 1.0]), 0.5)


class StudyTest(absltest.TestCase):

  def test_runs_and_is_drawn(self):
    summary = small.measured("incremental_rank")
    self.assertLen(summary["claims"], 5)
    figure, texts = small.drawn("incremental_rank")
    self.assertLen(figure.axes, 2)
    self.assertContainsSubset([r"$\alpha=0.1$", "key and query"], texts)


if __name__ == "__main__":
  absltest.main()
