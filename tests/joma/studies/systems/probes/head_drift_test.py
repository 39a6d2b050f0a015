from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.studies.systems.probes import head_drift
from joma.studies.systems.subjects import instructions
from scansnap_jax.experiment import errors
from tests.joma.studies.systems import small

_TASK = instructions.Instructions(num_values=5, span=3)


class HeadDriftTest(absltest.TestCase):

  @pytest.mark.slow
  def test_runs_and_is_drawn(self):
    summary = small.measured("head_drift")
    self.assertLen(summary["claims"], 3)
    self.assertEqual(summary["claims"][1]["it"], "holds")
    self.assertEqual(np.shape(summary["updated"]["layers"]), (2, 2))
    figure, texts = small.drawn("head_drift")
    self.assertLen(figure.axes, 2)
    self.assertContainsSubset(["layer that is updated", "model 1"], texts)

  def test_only_the_user_s_word_differs(self):
    found = jax.tree.map(
        np.asarray,
        jax.jit(_TASK.pairs, static_argnums=1)(jax.random.key(0), 40),
    )
    self.assertEqual(found.conflict.shape, (40, 9))
    for row in range(40):
      without, conflict = found.without[row], found.conflict[row]
      (place,) = np.flatnonzero(conflict < 5)[1:]
      self.assertEqual(found.roles[row, place], instructions.USER)
      self.assertEqual(conflict[place], found.user[row])
      (told,) = np.flatnonzero(without < 5)
      self.assertEqual(found.roles[row, told], instructions.SYSTEM)
      self.assertEqual(without[told], found.system[row])
      self.assertNotEqual(found.system[row], found.user[row])
      other = np.arange(9) != place
      np.testing.assert_array_equal(without[other], conflict[other])
      self.assertEqual(conflict[-1], _TASK.ask)

  def test_answers_follow_whom_the_model_obeys(self):
    for obeys in (instructions.SYSTEM, instructions.USER):
      task = instructions.Instructions(num_values=5, span=3, obeys=obeys)
      draw = jax.jit(task.draw, static_argnums=1)
      texts = jax.tree.map(np.asarray, draw(jax.random.key(1), 20))
      for row, (text, target) in enumerate(
          zip(texts.tokens, texts.targets, strict=True)
      ):
        said = text[text < 5].tolist()
        self.assertLen(said, 1 + row % 2)
        self.assertEqual(target[-1], said[-1 if obeys else 0])
      np.testing.assert_array_equal(texts.is_asked.sum(axis=1), 1)

  def test_others_are_kept_only_where_they_are(self):
    start = {"layers_0": jnp.ones(2), "layers_1": jnp.ones(2)}
    after = {"layers_0": jnp.ones(2), "layers_1": jnp.zeros(2)}
    self.assertTrue(head_drift._is_kept(start, after, 1))
    self.assertFalse(head_drift._is_kept(start, after, 0))
    self.assertFalse(head_drift._is_kept(start, start, 1))

  def test_claims_are_of_the_layer_that_drifts_most(self):
    planted = {"rank": [1, 1], "ratio": [2.0, 3.0], "before": [4, 5]}
    planted["num_heads"] = 8
    layers = [[0.9, 0.1, 0.2], [0.1, 0.2, 0.9]]
    updated = {"layers": layers, "focal": [0, 2], "is_kept": True}
    updated |= {"before": [0.0, 0.0], "all": [1.0, 1.0]}
    told = head_drift._claims(planted, updated)
    self.assertEqual([row["it"] for row in told], ["holds"] * 3)
    self.assertIn("0.750 [0.750, 0.750]", told[2]["measured"])
    planted["rank"], updated["focal"] = [1, 2], [1, 2]
    updated["is_kept"] = False
    told = head_drift._claims(planted, updated)
    self.assertEqual([row["it"] for row in told], ["FAILED"] * 3)

  def test_says_what_would_be_right(self):
    with self.assertRaisesRegex(errors.UserError, "update_rate"):
      head_drift.DriftConfig(update_rate=0.0)


if __name__ == "__main__":
  absltest.main()
