from absl.testing import absltest
import jax
import numpy as np
import pytest

from joma.studies.systems import retrieval
from joma.studies.systems.subjects import facts
from scansnap_jax.experiment import errors
from tests.joma.studies.systems import small


class RetrievalTest(absltest.TestCase):

  @pytest.mark.slow
  def test_runs_and_is_drawn(self):
    summary = small.measured("retrieval")
    self.assertLen(summary["claims"], 7)
    self.assertEqual(summary["claims"][0]["it"], "FAILED")  # It is untrained.
    self.assertLessEqual(summary["num_kept"]["most"], summary["num_slots"])
    figure, texts = small.drawn("retrieval")
    self.assertLen(figure.axes, 2)
    self.assertContainsSubset(["share of right answers"], texts)

  def test_keys_that_come_again_ask_for_their_value(self):
    task = facts.Facts(num_facts=4, num_asked=2, num_keys=9, num_values=5)
    draw = jax.jit(task.draw, static_argnums=1)
    tokens, targets, is_asked, _ = map(np.asarray, draw(jax.random.key(0), 6))
    self.assertEqual(tokens.shape, (6, 18))
    for text, target, asked in zip(tokens, targets, is_asked, strict=True):
      told = text[:12].reshape(4, 3)
      value = dict(told[:, :2].tolist())
      self.assertLen(value, 4)
      np.testing.assert_array_equal(told[:, 2], 0)
      self.assertEqual(np.flatnonzero(asked).tolist(), list(range(12, 18)))
      for question in text[12:].reshape(2, 3):
        self.assertLen(set(question), 1)
      want = [value[key] for key in text[12:]]
      self.assertEqual(target[asked].tolist(), want)

  def test_claims_need_every_policy_below(self):
    row = lambda mean: {"mean": mean, "low": mean, "high": mean}
    names = ("full", *retrieval.RetrievalConfig().policies)
    kept = {name: row(0.5) for name in names} | {"full": row(1.0)}
    kept |= {"infini_retri": row(0.9), "first layer": row(0.2)}
    read = {name: row(0.98) for name in retrieval._READINGS}
    found = {"found": kept, "landmark": read | {retrieval._TWIN: row(0.1)}}
    found |= {"num_learned": [3, 3], "num_seeds": 3}
    found |= {"num_slots": 8, "num_kept": {"most": 8, "mean": 6.0}}
    config = retrieval.RetrievalConfig()
    told = [claim["it"] for claim in retrieval._claims(config, found)]
    self.assertEqual(told, ["holds"] * 7)
    kept["h2o"] = row(0.95)
    found["num_learned"] = [3, 2]
    found["num_kept"]["most"] = 9
    told = [claim["it"] for claim in retrieval._claims(config, found)]
    self.assertEqual(told[:3], ["FAILED"] * 3)

  def test_says_what_would_be_right(self):
    with self.assertRaisesRegex(errors.UserError, "'h3o' is unknown"):
      retrieval.RetrievalConfig(policies=("h3o",))
    with self.assertRaisesRegex(errors.UserError, "num_keys must be from 40"):
      retrieval.RetrievalConfig(num_keys=20)


if __name__ == "__main__":
  absltest.main()
