"""Tests of the study of contexts longer than those of training."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.transformer import config as configs
from joma.transformer import model as models
from joma.transformer.rope import extension
from joma.transformer.rope import extension_config
from joma.transformer.text import corpus as corpus_lib
from joma.transformer.text import corpus_text
from joma.transformer.text import tokenizer
from scansnap_jax.experiment import errors
from tests.joma.transformer import applied

_CONFIG = extension_config.RopeExtensionConfig(
    window=4, factor=2, bin_size=2, num_texts=3
)


class RopeExtensionConfigTest(parameterized.TestCase):

  @parameterized.parameters(
      ({"embed_dim": 48}, "embed_dim must be a multiple of the 32"),
      ({"window": 64, "bin_size": 7}, "window=64 must be a multiple of"),
      ({"factor": 1}, "factor must be at least 2"),
      ({"batch_size": 3}, "batch_size must be at least 4"),
  )
  def test_setting_that_cannot_be_is_refused(self, changes, message):
    with self.assertRaisesRegex(errors.UserError, message):
      extension_config.RopeExtensionConfig(**changes)

  def test_tuning_reads_longer_texts_with_as_many_tokens_a_step(self):
    config = extension_config.RopeExtensionConfig()
    training, tuning = config.training, config.tuning
    self.assertEqual((training.seq_len, tuning.seq_len), (64, 256))
    self.assertEqual(
        training.batch_size * training.seq_len,
        tuning.batch_size * tuning.seq_len,
    )


def _corpus(num_valid):
  """A corpus whose validation text counts up."""
  text = corpus_text.Text("counted", {}, {})
  ids = np.arange(num_valid, dtype=np.uint16)
  return corpus_lib.Corpus(text, tokenizer.Bytes(), ids[:0], ids, ids[:0])


class TextsTest(absltest.TestCase):

  def test_texts_lie_side_by_side_and_count_as_asked(self):
    texts = extension._texts(_CONFIG, _corpus(40))
    np.testing.assert_array_equal(texts, np.arange(27).reshape(3, 9))

  def test_text_for_less_than_two_is_refused(self):
    with self.assertRaisesRegex(errors.UserError, "17 tokens: not two"):
      extension._texts(_CONFIG, _corpus(17))


class PositionLossesTest(absltest.TestCase):

  @pytest.mark.slow
  def test_losses_are_those_of_the_next_token_at_each_position(self):
    model = models.Transformer(
        configs.TransformerConfig(
            vocab_size=5,
            num_layers=1,
            embed_dim=4,
            num_heads=1,
            num_kv_heads=1,
            head_dim=4,
            hidden_dim=4,
        )
    )
    texts = jnp.array([[1, 2, 0, 4], [3, 3, 1, 0]])
    params = applied.params(model)
    losses = jax.jit(
        lambda params: extension.position_losses(model, params, texts)
    )(params)
    logits = jax.jit(model.apply)({"params": params}, texts)
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    expected = [
        [-log_probs[b, t, texts[b, t + 1]] for t in range(3)] for b in range(2)
    ]
    # Rounding of float32.
    np.testing.assert_allclose(losses, expected, atol=1e-5)


class CurveTest(absltest.TestCase):

  def test_bins_and_ranges_derived_by_hand(self):
    losses = np.array([[0.0, 2, 4, 6, 8, 10, 12, 14], [2.0] * 8])
    curve = extension._curve(_CONFIG, losses)
    # Bins of two positions: 1, 5, 9, 13 and 2, mean over the two texts.
    np.testing.assert_allclose(curve["loss"], [1.5, 3.5, 5.5, 7.5])
    # Half the difference of two is their standard error.
    np.testing.assert_allclose(curve["error"], [0.5, 1.5, 3.5, 5.5])
    # Of two texts: Student's t with one degree of freedom.
    half = (np.array(curve["high"]) - curve["low"]) / 2
    np.testing.assert_allclose(half, 12.7062 * curve["error"], rtol=1e-4)
    # L = 4: positions 3 and 4, and 5 to 8.
    self.assertEqual(curve["within"], (5 + 2) / 2)
    self.assertEqual(curve["beyond"], (11 + 2) / 2)


if __name__ == "__main__":
  absltest.main()
