"""Texts in, texts and maps out: what the parts give, by another way."""

import pathlib
from unittest import mock

from absl.testing import absltest
import numpy as np
import pytest

from joma.inference import generate
from joma.inference import language_model
from joma.transformer import config as configs
from joma.transformer import model as models
from joma.transformer.hf import pretrained
from joma.transformer.text import tokenizer
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require
from tests.joma.transformer import applied

_CONFIG = configs.TransformerConfig(
    vocab_size=256,
    num_layers=2,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    hidden_dim=16,
    max_len=64,
)
_TEXT = "sinks, and what is heavy"


class LanguageModelTest(absltest.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    model = models.Transformer(_CONFIG)
    cls.lm = language_model.LanguageModel(
        model, applied.params(model, 1), tokenizer.Bytes()
    )

  @pytest.mark.slow
  def test_continues_as_generate_does(self):
    ids = np.frombuffer(_TEXT.encode(), np.uint8).astype(np.int32)
    expected = generate.generate(
        self.lm.model, self.lm.params, [ids], max_new_tokens=5
    )[0]
    expected = bytes(expected.tolist()).decode(errors="replace")
    self.assertEqual(self.lm.continue_text(_TEXT, max_new_tokens=5), expected)
    # Room for everything: nothing leaves.
    found = self.lm.continue_text(
        _TEXT, max_new_tokens=5, policy="h2o:num_recent=2", capacity=40
    )
    self.assertEqual(found, expected)

  def test_a_window_keeps_the_last_tokens(self):
    kept = self.lm.kept_positions(_TEXT, policy="window", capacity=6)
    last = np.arange(len(_TEXT) - 6, len(_TEXT))
    np.testing.assert_array_equal(kept, np.broadcast_to(last, (2, 2, 6)))

  def test_weights_are_causal_distributions(self):
    weights = self.lm.attn_weights(_TEXT)
    self.assertEqual(weights.shape, (2, 4, 24, 24))
    np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-6)
    self.assertEqual(np.abs(np.triu(weights, 1)).max(), 0)
    # They are the layer's own: the second token's depend on its logits.
    self.assertGreater(np.ptp(weights[:, :, 1, 0]), 1e-4)

  @pytest.mark.slow
  def test_what_ends_a_text_is_not_shown(self):
    whole = generate.generate(
        self.lm.model, self.lm.params, [[65, 66]], max_new_tokens=4
    )[0]
    ended = language_model.LanguageModel(
        self.lm.model, self.lm.params, self.lm.tokenizer, (int(whole[0]),)
    )
    self.assertEqual(ended.continue_text("AB", max_new_tokens=4), "")

  @pytest.mark.slow
  def test_a_folder_gives_the_same(self):
    folder = self.create_tempdir().full_path
    pretrained.save(folder, _CONFIG, self.lm.params)
    tokenizer.save(tokenizer.Bytes(), pathlib.Path(folder))
    loaded = language_model.load(folder)
    np.testing.assert_allclose(
        loaded.attn_weights("ab"), self.lm.attn_weights("ab"), atol=1e-6
    )

  def test_a_text_that_cannot_be_read_is_named(self):
    found = self.lm
    with self.assertRaisesRegex(errors.UserError, "has no tokens"):
      found.attn_weights("")
    for call in (found.attn_weights, found.continue_text):
      with self.assertRaisesRegex(errors.UserError, "a string, got NoneType"):
        call(None)
    with mock.patch.object(require.limits, "memory", lambda: (1e3, "it has")):
      with self.assertRaisesRegex(errors.UserError, "a text of 9 tokens"):
        found.attn_weights("nine char")

  def test_policy_and_capacity_go_together(self):
    for options in (
        {"policy": "h2o"},
        {"policy": "full", "capacity": 4},
        {"policy": "h3o", "capacity": 4},
    ):
      with self.subTest(**options):
        with self.assertRaisesRegex(errors.UserError, "policy="):
          self.lm.continue_text("a", **options)
    with self.assertRaisesRegex(errors.UserError, "keeps tokens in slots"):
      self.lm.kept_positions("abcd", policy="quest", capacity=64)


if __name__ == "__main__":
  absltest.main()
