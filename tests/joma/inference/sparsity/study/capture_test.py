"""Tests of what is written to disk for predictors to learn from."""

import dataclasses
import json
import pathlib
from typing import Any

from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.inference.sparsity import contextual_config
from joma.inference.sparsity.study import capture
from joma.transformer import config as configs
from joma.transformer import model as models
from scansnap_jax.experiment import errors
from tests.joma.transformer import applied

_MODEL = models.Transformer(
    configs.TransformerConfig(
        vocab_size=17,
        num_layers=2,
        embed_dim=8,
        num_heads=2,
        num_kv_heads=2,
        head_dim=4,
        hidden_dim=20,
        activation="relu",
        use_gated_mlp=False,
    )
)
_CONFIG = contextual_config.CaptureConfig(
    label="sign", block_size=2, batch_size=2, dtype="float32"
)
_TEXTS = np.random.default_rng(0).integers(17, size=(5, 6)).astype(np.int32)


def make_params(scale=1.0):
  params = applied.params(_MODEL)
  return jax.tree.map(lambda leaf: scale * leaf, params)


class CaptureTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path) / "new"
    self.params = make_params()

  def test_rows_are_what_the_model_computes_in_order(self):
    shards = capture.write(_MODEL, self.params, _TEXTS, self.folder, _CONFIG)
    self.assertEqual((shards.num_rows, shards.num_texts), (30, 5))
    ids = np.array([29, 0, 13, 12, 0])
    found = {name: shards.rows(name, ids) for name in capture.FIELDS}
    _, seen = jax.jit(
        lambda params, tokens: _MODEL.apply(
            {"params": params}, tokens, mutable="intermediates"
        )
    )(self.params, jnp.asarray(_TEXTS))
    seen = seen["intermediates"]
    layer_in = seen["resid_embed"][0]
    for layer in range(2):
      here = seen[f"layers_{layer}"]
      pre = here["mlp"]["hidden_pre"][0].reshape(5, 6, 10, 2)
      heads = jnp.linalg.norm(here["attn"]["head_out"][0], axis=-1)
      for name, expected in (
          ("layer_in", layer_in),
          ("mlp_in", here["resid_attn"][0]),
          ("units", (pre > 0).any(axis=-1)),
          ("heads", heads),
      ):
        expected = np.asarray(expected).reshape(30, -1)[ids]
        # Another batch size may round otherwise.
        np.testing.assert_allclose(
            found[name][:, layer], expected, atol=1e-5, err_msg=name
        )
      layer_in = here["resid_mlp"][0]

  def test_the_manifest_states_the_bytes_on_disk(self):
    shards = capture.write(_MODEL, self.params, _TEXTS, self.folder, _CONFIG)
    there = sum(np.load(path).nbytes for path in self.folder.glob("*.npy"))
    self.assertEqual(shards.manifest["bytes"], there)
    # Two layers of 2 x 8 numbers, 10 units and 2 heads.
    row = 2 * (4 * (2 * 8 + 2) + 2)
    self.assertEqual(shards.manifest["bytes_per_row"], row)

  def test_what_is_missing_or_damaged_is_written_and_nothing_else(self):
    told = []
    capture.write(
        _MODEL, self.params, _TEXTS, self.folder, _CONFIG, told.append
    )
    self.assertEqual(told, [12, 12, 6])
    path = self.folder / capture.MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["crc32"]["1"]
    path.write_text(json.dumps({**manifest, "finished": [0, 2]}))
    with self.assertRaisesRegex(errors.UserError, "2 of 3 shards"):
      capture.load(self.folder)
    files = sorted(self.folder.glob("*.npy"))
    before = {p.name: (p.read_bytes(), p.stat().st_ino) for p in files}
    damaged = bytearray((self.folder / "00002.units.npy").read_bytes())
    damaged[-1] ^= 1
    (self.folder / "00002.units.npy").write_bytes(damaged)
    capture.write(_MODEL, self.params, _TEXTS, self.folder, _CONFIG)
    after = {p.name: (p.read_bytes(), p.stat().st_ino) for p in files}
    for name, (content, inode) in after.items():
      self.assertEqual(content, before[name][0], name)
      is_kept = inode == before[name][1]  # A file that is written is a new one.
      self.assertEqual(is_kept, name.startswith("00000"), name)

  @pytest.mark.slow
  def test_a_manifest_that_is_none_is_one_sentence(self):
    self.folder.mkdir()
    path = self.folder / capture.MANIFEST
    for text in ("[" * 100_000, "[]", "{}", '{"of": 3}'):
      path.write_text(text)
      with self.assertRaisesRegex(errors.UserError, "manifest.json"):
        capture.load(self.folder)

  @pytest.mark.slow
  def test_another_capture_in_the_folder_is_named(self):
    capture.write(_MODEL, self.params, _TEXTS, self.folder, _CONFIG)
    other = dataclasses.replace(_CONFIG, label="magnitude")
    with self.assertRaisesRegex(errors.UserError, "label.*sign.*magnitude"):
      capture.write(_MODEL, self.params, _TEXTS, self.folder, other)
    with self.assertRaisesRegex(errors.UserError, "params"):
      capture.write(_MODEL, make_params(1.1), _TEXTS, self.folder, _CONFIG)
    with self.assertRaisesRegex(errors.UserError, "texts"):
      capture.write(_MODEL, self.params, _TEXTS[1:], self.folder, _CONFIG)

  @pytest.mark.slow
  def test_bad_input_is_refused(self):
    cases: Any = (
        ({"block_size": 3}, _TEXTS, 1, "3 must divide the 20 neurons"),
        ({}, _TEXTS[:0], 1, "no text to capture"),
        ({"dtype": "float16"}, _TEXTS, 1e6, "too large for float16"),
    )
    for changes, texts, scale, message in cases:
      config = dataclasses.replace(_CONFIG, **changes)
      with self.assertRaisesRegex(errors.UserError, message):
        capture.write(_MODEL, make_params(scale), texts, self.folder, config)
    with self.assertRaisesRegex(errors.UserError, "no capture"):
      capture.load(self.folder / "absent")


if __name__ == "__main__":
  absltest.main()
