from absl.testing import absltest
import jax.numpy as jnp
import numpy as np
import pytest

from joma.studies.theories import dilution
from tests.joma.studies.theories import small

_CONFIG = dilution.DilutionConfig(
    num_symbols=4, length=3, num_sequences=2, width=3, scale=0.7
)


def _forward(params, chains):
  """Loss and entropy, by loops."""
  p = {name: np.asarray(value, np.float64) for name, value in params.items()}
  losses, entropies = [], []
  for chain in chains:
    e = p["embedding"][chain[:-1]]
    for i in range(len(e)):
      logits = [(e[i] @ p["query"]) @ (e[j] @ p["key"]) for j in range(i + 1)]
      weights = np.exp(logits) / np.exp(logits).sum()
      read = weights @ e[: i + 1] @ p["value"] @ p["output"]
      losses.append(np.log(np.exp(read).sum()) - read[chain[i + 1]])
      entropies.append(-(weights * np.log(weights)).sum())
  return np.mean(losses), np.mean(entropies)


class TrainTest(absltest.TestCase):

  def test_a_step_goes_down_the_slope_and_is_recorded(self):
    chains = dilution.draw_chains(_CONFIG, 0)
    params = dilution.start(_CONFIG, 0)
    found = dilution.train(
        params, jnp.asarray(chains), jnp.ones(4) / 2, (1, 1), 0.5
    )
    after = {}
    for name, value in params.items():
      value = np.asarray(value, np.float64)
      slope = np.zeros(value.shape)
      for place in np.ndindex(value.shape):
        ends = []
        for sign in (1, -1):
          moved = value.copy()
          moved[place] += sign * 1e-5
          ends.append(_forward(params | {name: moved}, chains)[0])
        slope[place] = (ends[0] - ends[1]) / 2e-5
      after[name] = value - 0.5 * slope
    loss, entropy = _forward(after, chains)
    self.assertAlmostEqual(float(found.loss[0]), loss, places=5)
    self.assertAlmostEqual(float(found.entropy[0]), entropy, places=5)
    left, values, _ = np.linalg.svd(after["embedding"])
    share = values**2 / (values**2).sum()
    want = np.exp(-(share * np.log(share)).sum())
    self.assertAlmostEqual(float(found.rank[0]), want, places=4)
    self.assertAlmostEqual(
        float(found.along[0]), abs(left[:, 0].sum()) / 2, places=4
    )

  def test_first_direction_is_that_of_shares_and_what_follows(self):
    chains = np.array([[0, 1, 2, 0], [3, 3, 1, 2]])
    total = np.zeros((4, 4))
    for chain in chains:
      for i in range(3):
        share = np.bincount(chain[: i + 1], minlength=4) / (i + 1)
        total += np.outer(share, np.eye(4)[chain[i + 1]] - 1 / 4)
    found = dilution.first_direction(chains, 4)
    values, vectors = np.linalg.eigh(total @ total.T)
    self.assertAlmostEqual(abs(found @ vectors[:, values.argmax()]), 1)


class TurnsTest(absltest.TestCase):

  def test_extremes_are_those_beyond_the_bound(self):
    curve = np.array([5.0, 5.05, 4.0, 3.0, 3.05, 2.95, 4.0, 3.95, 4.1, 1.0])
    # Down from 5.05 to 2.95, up to 4.1, down to the end; steps of .05 and .1
    # are none.
    self.assertEqual(dilution.turns(curve, 0.1), [1, 5, 8, 9])
    self.assertEqual(dilution.turns(curve[:6], 0.1), [1, 5])
    self.assertEqual(dilution.turns(np.full(5, 1.0), 0.1), [])
    self.assertEqual(dilution.turns(np.array([1.0, 2.0, 3.0]), 0.1), [])


class ClaimsTest(absltest.TestCase):

  def test_a_second_fall_has_to_be_in_every_run(self):
    names = ("loss", "entropy", "rank", "on_frequent", "along")
    rows = {name: np.full((2, 9), 1.0) for name in names}
    rows["entropy"][:, 3:] = 0.5  # Crossed at record 3.
    rows["rank"][:, 3:] = 7.0
    rows["along"][:, 3:] = 0.0
    rows["on_frequent"][:, 2] = -1.0
    it = lambda places: [
        row["it"] == "holds" for row in dilution._claims(rows, places)
    ]
    self.assertEqual(it([[0, 3, 5, 8], [1, 3, 4, 5, 6]]), [True] * 6)
    self.assertEqual(it([[0, 3, 5], [1, 2, 3, 4]])[3:], [False, True, False])
    self.assertEqual(it([[], [1, 3, 4, 5]]), [False] * 6)


class StudyTest(absltest.TestCase):

  @pytest.mark.slow
  def test_runs_and_is_drawn(self):
    summary = small.measured("dilution")
    self.assertLen(summary["claims"], 6)
    self.assertEqual(np.shape(summary["entropy"]), (2, 3))
    figure, texts = small.drawn("dilution")
    self.assertLen(figure.axes, 2)
    self.assertContainsSubset(["run 1", "rank of the embeddings"], texts)


if __name__ == "__main__":
  absltest.main()
