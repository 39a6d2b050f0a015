"""Tests of the bridge in one layer."""

import dataclasses

from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.inference.bridge import config as bridge_config
from joma.inference.bridge import one_layer
from joma.inference.bridge import recall
from scansnap_jax import config as scansnap_config
from scansnap_jax import data as data_lib
from scansnap_jax import metrics

_DATA = scansnap_config.DataConfig(
    num_next_per_last=2, num_common=3, num_distinct_per_next=3
)
_CLASSES = data_lib.make_classes(_DATA, num_last=2)


def _attended(attn_logits):
  return np.asarray(
      metrics.attended_distribution(
          jnp.asarray(attn_logits, jnp.float32),
          jnp.asarray(_CLASSES.probs, jnp.float32),
          jnp.asarray(_CLASSES.query, jnp.int32),
      )
  )


class ScoresTest(absltest.TestCase):

  def test_distinct_tokens_gain_by_probability_and_common_ones_lose(self):
    """Theorem 2 and Corollary 2: f_nl^2 xi_n > 0, and < 0."""
    distinct = np.flatnonzero(_CLASSES.is_distinct[1])
    tokens = np.concatenate([np.arange(3), distinct])[None]
    scores = one_layer.scores(_CLASSES, tokens, np.array([1]))
    theory = scores["theory"][0]
    self.assertLess(theory[:3].max(), 0)
    self.assertGreater(theory[3:].min(), 0)
    probs = _CLASSES.probs[1, distinct]
    # Equal ratios to f^2, in float32.
    ratio = theory[3:] / probs**2
    np.testing.assert_allclose(ratio / ratio[0], 1, rtol=1e-4)
    # What is common is the most frequent all the same.
    self.assertLess(scores["frequency"][0, 3:].max(), scores["frequency"][0, 0])

  def test_frequency_is_that_of_all_texts(self):
    rare = dataclasses.replace(
        _CLASSES, class_probs=np.array([0.7, 0.1, 0.1, 0.1])
    )
    tokens = np.arange(_CLASSES.num_tokens)[None]
    found = one_layer.scores(rare, tokens, np.array([0]))["frequency"][0]
    self.assertAlmostEqual(found.sum(), 1)
    distinct = np.flatnonzero(_CLASSES.is_distinct[0])[-1]
    self.assertAlmostEqual(found[distinct], 0.7 * _CLASSES.probs[0, distinct])


class StreamWeightsTest(absltest.TestCase):

  def test_row_is_the_softmax_over_what_has_come(self):
    rng = np.random.default_rng(0)
    size = _CLASSES.num_tokens
    attn_logits = rng.normal(size=(size, size))
    tokens = np.array([[0, 1, 0, 2], [1, 1, 2, 0]])
    class_index = np.array([3, 0])
    weights = one_layer.stream_weights(
        _attended(attn_logits), _CLASSES, tokens, class_index
    )
    for b in range(2):
      z = attn_logits[_CLASSES.query[class_index[b]], tokens[b]]
      for i in range(4):
        expected = np.exp(z[: i + 1]) / np.exp(z[: i + 1]).sum()
        # Logits are rounded to four digits.
        np.testing.assert_allclose(weights[b, i, : i + 1], expected, rtol=2e-4)
        np.testing.assert_array_equal(weights[b, i, i + 1 :], 0)

  @pytest.mark.slow
  def test_texts_are_not_those_that_training_draws(self):
    config = bridge_config.BridgeConfig(num_sequences=5)
    tokens, _ = one_layer.draw(config, _CLASSES, 3)
    trained, _ = data_lib.sample_sequences(
        jax.random.key(3), _CLASSES, batch_size=5, seq_len=config.seq_len
    )
    self.assertLess((tokens == np.asarray(trained)[:, :-1]).mean(), 0.5)

  def test_without_training_there_is_nothing_to_find(self):
    size = _CLASSES.num_tokens
    config = bridge_config.BridgeConfig(num_sequences=5)
    tokens, class_index = one_layer.draw(config, _CLASSES, 0)
    self.assertEqual(tokens.shape, (5, 127))
    occurs = _CLASSES.probs[class_index[:, None], tokens] > 0
    self.assertTrue(occurs.all())
    weights = one_layer.stream_weights(
        _attended(np.zeros((size, size))), _CLASSES, tokens, class_index
    )
    mass = recall.future_mass(weights)
    # All are alike, so that any predictor is as good as chance.
    np.testing.assert_allclose(recall.membership(mass, 16), 16 / 63)


if __name__ == "__main__":
  absltest.main()
