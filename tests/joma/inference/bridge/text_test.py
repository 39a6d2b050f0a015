"""Tests of the bridge on text."""

import functools
import json
import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np
import pytest

from joma.inference.bridge import config as bridge_config
from joma.inference.bridge import recall
from joma.inference.bridge import text as bridge_text
from joma.transformer import config as configs
from joma.transformer import model as models
from joma.transformer.text import corpus as corpus_lib
from joma.transformer.text import corpus_text
from joma.transformer.text import tokenizer
from joma.transformer.training import lm_config
from scansnap_jax.experiment import errors

_MODEL = configs.TransformerConfig(
    vocab_size=256,
    num_layers=2,
    embed_dim=8,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    hidden_dim=8,
    max_len=8,
)
_LM = lm_config.LmConfig(
    model=_MODEL, seq_len=8, num_steps=50, map_steps=(0, 50)
)


def _corpus(num_tokens):
  text = corpus_text.Text("random", {}, {})
  ids = np.random.default_rng(0).integers(97, 105, num_tokens)
  ids = ids.astype(np.uint16)
  return corpus_lib.Corpus(text, tokenizer.Bytes(), ids, ids, ids[:0])


class BridgeConfigTest(parameterized.TestCase):

  @parameterized.parameters(
      ({"budget": 1.0}, r"budget must lie in \(0, 1\), got 1.0"),
      ({"positions": ()}, "positions must name none, rotary or both"),
      ({"positions": ("none", "none")}, "none, rotary or both"),
      ({"num_lm_seeds": 1}, "num_lm_seeds must be at least 2"),
      ({"lm": lm_config.LmConfig(seq_len=4)}, "lm.seq_len must be at least 8"),
      ({"lm": lm_config.LmConfig(map_steps=(0,))}, "must name the last step"),
      (
          {
              "lm": lm_config.LmConfig(
                  model=configs.TransformerConfig(vocab_size=28_782)
              )
          },
          "up to 8192 types",
      ),
  )
  def test_setting_that_cannot_be_is_refused(self, changes, message):
    with self.assertRaisesRegex(errors.UserError, message):
      bridge_config.BridgeConfig(**changes)

  def test_sweep_in_one_layer_is_refused(self):
    one_layer = bridge_config.one_layer()
    with self.assertRaisesRegex(errors.UserError, "one setting with two seeds"):
      bridge_config.BridgeConfig(
          scansnap=one_layer.__class__(lr_z=(1.0, 2.0), record_attention=True)
      )

  def test_runs_differ_in_seed_and_positions_alone(self):
    config = bridge_config.BridgeConfig()
    runs = [config.training(p, r) for p in ("none", "rotary") for r in (0, 1)]
    self.assertEqual([run.seed for run in runs], [1, 2, 1, 2])
    self.assertEqual(runs[0].model.positions, "none")
    self.assertEqual(runs[2], config.lm)


class CutTest(absltest.TestCase):

  def test_stretches_spread_over_the_text(self):
    text = np.arange(11, dtype=np.uint16)
    np.testing.assert_array_equal(
        bridge_text.cut(text, 3, 2, "x"), [[0, 1, 2], [8, 9, 10]]
    )
    # No more than lie side by side.
    self.assertLen(bridge_text.cut(text, 3, 100, "x"), 3)

  def test_text_for_less_than_two_is_refused(self):
    with self.assertRaisesRegex(errors.UserError, "x text has 11 .* of 6"):
      bridge_text.cut(np.arange(11), 6, 5, "x")


class SubjectTest(absltest.TestCase):

  @pytest.mark.slow
  def test_heads_of_all_layers_are_read_and_measured(self):
    model = models.Transformer(_MODEL)
    config = bridge_config.BridgeConfig(
        lm=_LM, num_sequences=40, num_windows=60
    )
    subject = bridge_text.Subject(config, _corpus(700))
    tokens = subject._tokens
    seen = jax.jit(functools.partial(model.init, mutable=True))(
        jax.random.key(0), tokens[35:]
    )
    params = seen["params"]
    mass, running = bridge_text.read(model, params, tokens)
    # Two layers of two heads; more sequences than are read at once.
    self.assertEqual(mass.shape, (40, 4, 4))
    attn = seen["intermediates"]["layers_1"]["attn"]["attn_weights"][0]
    # Rounding of float32.
    np.testing.assert_allclose(
        mass[35:, 2:], recall.future_mass(np.asarray(attn)), atol=1e-5
    )
    np.testing.assert_allclose(
        running[35:, 2:], recall.running_score(np.asarray(attn)), atol=1e-5
    )
    found = subject.measure(model, params)
    expected = recall.recall(running, mass, 1).mean()
    self.assertAlmostEqual(found["h2o"], expected, delta=1e-12)
    self.assertAlmostEqual(found["random"], 1 / 4, delta=1e-12)
    self.assertBetween(found["partial"], -1, 1)


class RowTest(absltest.TestCase):

  def test_a_row_that_is_not_what_was_written_is_named(self):
    path = pathlib.Path(self.create_tempdir().full_path) / "recall_5.json"
    row = {"theory": 0.25, "chance": 0.1}
    written = json.dumps({"row": row, "crc32": bridge_text._crc32(row)})
    path.write_text(written)
    self.assertEqual(bridge_text._read_row(path), row)
    for text in (written.replace("0.25", "0.75"), "{}", "[]", written[:-1]):
      path.write_text(text)
      with self.assertRaisesRegex(errors.UserError, "recall_5.json is damaged"):
        bridge_text._read_row(path)
    path.unlink()
    with self.assertRaisesRegex(errors.UserError, "No such file"):
      bridge_text._read_row(path)


if __name__ == "__main__":
  absltest.main()
