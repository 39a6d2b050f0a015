from absl.testing import absltest
import jax
import numpy as np
import pytest

from joma.studies.systems.readouts import pairs
from joma.studies.systems.subjects import pair_texts
from scansnap_jax.experiment import errors
from tests.joma.studies.systems import small

_ORDER = pair_texts.Order(num_values=5, num_tokens=4)


class PairsTest(absltest.TestCase):

  @pytest.mark.slow
  def test_runs_and_is_drawn(self):
    summary = small.measured("pairs")
    self.assertLen(summary["claims"], 4)
    self.assertEqual(summary["claims"][0]["it"], "FAILED")  # It is untrained.
    self.assertEqual(summary["claims"][3]["it"], "holds")
    _, texts = small.drawn("pairs")
    self.assertContainsSubset(["pair head", "share of right answers"], texts)

  def test_a_text_beats_smaller_values(self):
    draw = jax.jit(_ORDER.draw, static_argnums=1)
    found = jax.tree.map(np.asarray, draw(jax.random.key(0), 300))
    seen = {}
    for one, two, beats in zip(*found, strict=True):
      (first,), (second,) = one[one < 5], two[two < 5]
      self.assertTrue(((one < 13) & (two < 13)).all())
      self.assertEqual(beats, first > second)
      seen[first, second] = beats
    # All pairs of unlike values, of which one way is won.
    self.assertLen(seen, 20)
    for (first, second), beats in seen.items():
      self.assertNotEqual(beats, seen[second, first])

  def test_claims_are_of_the_gain(self):
    answers = dict(
        zip(
            pairs.MODELS,
            np.array([[1.0, 0.98], [0.97, 0.96], [0.5, 0.51]]),
            strict=True,
        )
    )
    flops = dict(
        zip(pairs.MODELS, ([9.0, 99.0], [5.0, 5.0], [1.0, 1.0]), strict=True)
    )
    told = pairs._claims(answers, np.array([0.94, 0.95]), flops)
    self.assertEqual([row["it"] for row in told], ["holds"] * 4)
    flops["pair head"] = [5.0, 6.0]
    answers["dot product"] = np.array([0.5, 0.6])
    told = pairs._claims(answers, np.array([0.8, 0.95]), flops)
    self.assertEqual([row["it"] for row in told[1:]], ["FAILED"] * 3)

  def test_says_what_would_be_right(self):
    with self.assertRaisesRegex(
        errors.UserError, "num_values must be at least 2"
    ):
      pairs.PairsConfig(num_values=1)


if __name__ == "__main__":
  absltest.main()
