"""Landmark attention: dense where landmarks say what their blocks hold."""

from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.systems.selectors import landmark
from joma.transformer import config as configs
from joma.transformer import model as models
from tests.joma.systems.selectors import selected
from tests.joma.transformer import applied

_SIZE = 4


def _softmax(x):
  weights = np.exp(x - x.max())
  return weights / weights.sum()


def _by_hand(logits):
  """One row, whose last column is the query's own, by plain loops."""
  own, weights = (len(logits) - 1) // _SIZE, np.zeros(len(logits))
  is_mark = np.arange(len(logits)) % _SIZE == _SIZE - 1
  near = [s for s in range(own * _SIZE, len(logits)) if not is_mark[s]]
  marks = [b * _SIZE + _SIZE - 1 for b in range(own)]
  top = _softmax(logits[near + marks])
  weights[near] = top[: len(near)]
  for mark, mass in zip(marks, top[len(near) :], strict=True):
    block = slice(mark - _SIZE + 1, mark)
    weights[block] = mass * _softmax(logits[block])
  return weights


def _weights(logits):
  run = jax.jit(landmark.Landmark(_SIZE).of_logits)
  return np.asarray(run(jnp.asarray(logits)))


class LandmarkTest(absltest.TestCase):

  def test_a_landmark_that_says_what_its_block_holds_is_dense(self):
    """The twin weighs landmarks and tokens by one softmax."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5, 22)).astype(np.float32)
    is_mark = np.arange(22) % _SIZE == _SIZE - 1
    for b in range(5):
      block = logits[:, b * _SIZE : b * _SIZE + _SIZE - 1]
      logits[:, b * _SIZE + _SIZE - 1] = np.log(np.exp(block).sum(axis=1))
    tokens = np.where(is_mark, -np.inf, logits)
    want = np.exp(tokens) / np.exp(tokens).sum(axis=1, keepdims=True)
    found = _weights(logits)
    np.testing.assert_allclose(found, want, atol=1e-6)
    twin = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    self.assertGreater(np.abs(np.where(is_mark, 0, twin) - want).max(), 0.01)

  def test_weights_are_those_by_hand_and_sum_to_1(self):
    rng = np.random.default_rng(1)
    logits = np.full((22, 22), -np.inf, np.float32)
    logits[np.tril_indices(22)] = rng.normal(size=253)
    found = _weights(logits)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-6)
    for t in range(22):
      want = _by_hand(logits[t, : t + 1])
      np.testing.assert_allclose(found[t, : t + 1], want, atol=1e-6)

  def test_blocks_are_retrieved_by_their_landmarks(self):
    query, key, _ = selected.draw()
    found = selected.select(landmark.Landmark(_SIZE, k=3), query, key)
    query, key = np.asarray(query), np.asarray(key)
    for t in (0, 5, 13, 22):
      own = t // _SIZE
      marks = key[0, _SIZE - 1 :: _SIZE, 1]
      scores = np.asarray((query[0, t, 2:] @ marks.T).sum(axis=0))[:own]
      want = {own, *np.argsort(-scores)[:2].tolist()}
      self.assertEqual(set(selected.listed(found, 0, 3, t)), want)

  @pytest.mark.slow
  def test_with_all_blocks_it_is_the_form_that_is_trained(self):
    config = dict(
        vocab_size=11, num_layers=1, embed_dim=16, num_heads=4, num_kv_heads=2
    )
    make = lambda entry: models.Transformer(
        configs.TransformerConfig(
            **config, head_dim=8, hidden_dim=8, attention=(entry,)
        ),
        implementation="reference",
    )
    tokens = jax.random.randint(jax.random.key(1), (2, 22), 0, 11)
    whole = make("landmark:block=4")
    params = applied.params(whole)
    want = applied.loss_and_grads(whole, params, tokens)
    apart = lambda entry: max(
        float(jnp.abs(a - b).max())
        for a, b in zip(
            jax.tree.leaves(
                applied.loss_and_grads(make(entry), params, tokens)
            ),
            jax.tree.leaves(want),
            strict=True,
        )
    )
    self.assertLess(apart("landmark:block=4:k=6"), 1e-6)
    self.assertGreater(apart("landmark:block=4:k=2"), 1e-3)

  def test_landmarks_are_put_behind_whole_blocks(self):
    found = landmark.inserted(jnp.arange(8)[None], 99, _SIZE)
    want = [0, 1, 2, 99, 3, 4, 5, 99, 6, 7]
    self.assertEqual(np.asarray(found[0]).tolist(), want)


if __name__ == "__main__":
  absltest.main()
