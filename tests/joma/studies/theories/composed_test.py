from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np

from joma.studies.theories import composed
from tests.joma.studies.theories import small


def _loss(weights):
  """By loops over pairs, nodes and sums."""
  size = weights["a"].shape[1]
  total = 0.0
  for a in range(size):
    for b in range(size):
      votes = np.zeros(size)
      for j in range(len(weights["a"])):
        votes += (
            weights["c"][j] * (weights["a"][j, a] + weights["b"][j, b]) ** 2
        )
      error = votes - (np.arange(size) == (a + b) % size) / 2
      total += ((error - error.mean()) ** 2).sum() / size**2
  return total


def _solution(size):
  """Of each frequency 2 x 3 nodes: signs, and turns by a third."""
  numbers = np.arange(size)
  rows = {name: [] for name in "abc"}
  for k in range(1, (size + 1) // 2):
    wave = lambda turn, k=k: np.cos(2 * np.pi * (k * numbers / size + turn))
    for sign in (1, -1):
      for third in range(3):
        # Turns of a and b add up to that of c, so that they cancel elsewhere.
        rows["a"].append(wave(third / 3))
        rows["b"].append(sign * wave(third / 3))
        rows["c"].append(sign * wave(2 * third / 3))
  return {name: np.array(value) for name, value in rows.items()}


class LossTest(absltest.TestCase):

  def test_equals_loops(self):
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=(4, 5)) for name in "abc"}
    with jax.enable_x64(True):
      found = composed.mean_loss(jax.tree.map(jnp.asarray, weights))
    self.assertAlmostEqual(float(found), _loss(weights), places=10)


class ViolationsTest(absltest.TestCase):

  def test_a_network_of_waves_is_a_solution_by_loss_and_by_sums(self):
    weights = _solution(7)
    # r(k, k, k) of six nodes with amplitudes of 1 is 6 (7 / 2)^3.
    size = (49 / 4 / (6 * 3.5**3)) ** (1 / 3)
    weights = {name: size * value for name, value in weights.items()}
    found = composed.violations(composed.spectra(weights))
    self.assertLess(max(found.values()), 1e-12)
    self.assertLess(_loss(weights), 1e-24)

  def test_every_kind_of_violation_is_seen(self):
    weights = _solution(5)
    goal = (25 / 4 / (6 * 2.5**3)) ** (1 / 3)
    scaled = {name: goal * value for name, value in weights.items()}
    # Five of six nodes of a frequency: its sum, squares, and others are off.
    fewer = {name: value[1:] for name, value in scaled.items()}
    found = composed.violations(composed.spectra(fewer))
    self.assertAlmostEqual(found["same"], 1 / 6, places=9)
    self.assertGreater(found["others"], 0.1)
    self.assertGreater(found["squares"], 0.1)


class StudyTest(absltest.TestCase):

  def test_runs_and_is_drawn(self):
    summary = small.measured("composed")
    self.assertLen(summary["claims"], 4)
    figure, texts = small.drawn("composed")
    self.assertLen(figure.axes, 2)
    self.assertContainsSubset(["frequency 1", "seed"], texts)


if __name__ == "__main__":
  absltest.main()
