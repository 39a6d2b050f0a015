from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from joma.studies import texts
from joma.studies.systems import mqar_texts
from joma.transformer import config as configs

_TASK = mqar_texts.Pairs(seq_len=24, num_pairs=(2, 5), num_keys=6, num_values=7)


class PairsTest(parameterized.TestCase):

  def test_keys_are_answered_by_the_value_that_they_had(self):
    found = _TASK.draw(jax.random.key(0), 6)
    away = np.asarray(mqar_texts.distances(found))
    tokens, targets, is_asked, is_scored = map(np.asarray, found)
    np.testing.assert_array_equal(is_asked, is_scored)
    for row in range(6):
      num_pairs = 2 if row < 3 else 5
      first = tokens[row, : 2 * num_pairs].reshape(-1, 2)
      value_of = dict(first.tolist())
      self.assertLen(value_of, num_pairs)
      self.assertLess(max(value_of), 6)
      self.assertLen(set(value_of.values()), num_pairs)
      self.assertBetween(min(value_of.values()), 6, 12)
      for place in range(24):
        token, is_key = int(tokens[row, place]), place % 2 == 0
        asks = is_key and place >= 2 * num_pairs
        self.assertEqual(is_asked[row, place], asks)
        if is_key:
          self.assertEqual(targets[row, place], value_of[token])
          self.assertEqual(tokens[row, place + 1], value_of[token])
        earlier = [n for n in range(place) if tokens[row, n] == token]
        want = place - earlier[-1] if earlier else 24
        self.assertEqual(away[row, place], want)

  def test_values_say_nothing_of_keys(self):
    task = mqar_texts.Pairs(
        seq_len=24, num_pairs=(5,), num_keys=7, num_values=7
    )
    tokens = np.asarray(task.draw(jax.random.key(2), 4).tokens)[:, :10]
    for row in tokens.reshape(4, 5, 2):
      self.assertGreater(len(set((row[:, 1] - row[:, 0]).tolist())), 1)

  def test_a_seed_is_a_draw_of_its_own(self):
    draw = lambda seed: _TASK.draw(jax.random.key(seed), 4).tokens
    np.testing.assert_array_equal(draw(0), draw(0))
    self.assertFalse((draw(0) == draw(1)).all())
    self.assertFalse((draw(0)[0] == draw(0)[1]).all())

  def test_each_kind_of_text_counts_alike(self):
    learner = mqar_texts.PairsLearner(
        model=configs.TransformerConfig(vocab_size=2), task=_TASK, batch_size=4
    )
    is_asked = jnp.array([[1, 0], [0, 0], [1, 1], [1, 0]], bool)
    targets = jnp.array([[0, 0], [0, 0], [0, 1], [1, 0]])
    found = texts.Texts(targets, targets, is_asked, is_asked)
    # Says 0 with probability 3 / 4, always.
    logits = jnp.broadcast_to(jnp.log(jnp.array([3.0, 1.0])), (4, 2, 2))
    loss, scores = learner.measured(logits, found)
    few = -np.log(0.75)
    many = (-np.log(0.75) - 2 * np.log(0.25)) / 3
    np.testing.assert_allclose(loss, (few + many) / 2, rtol=1e-6)
    np.testing.assert_allclose(scores, [1, 1 / 3], rtol=1e-6)


if __name__ == "__main__":
  absltest.main()
