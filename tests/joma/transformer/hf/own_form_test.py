"""The project's own folders: what is written is read, what is wrong is told."""

import json
import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax.numpy as jnp

from joma.transformer import config as configs
from joma.transformer import model as models
from joma.transformer.hf import config_json
from joma.transformer.hf import own_form
from joma.transformer.hf import pretrained
from joma.transformer.rope import config as rope_config
from scansnap_jax.experiment import errors
from tests.joma.transformer import applied

_CONFIG = configs.TransformerConfig(
    vocab_size=11,
    num_layers=2,
    embed_dim=8,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    hidden_dim=8,
    windows=(0, 4),
    rope=rope_config.RopeConfig(rope_type="linear", factor=2.0),
    attention=("sink_logits:start=1", "softmax"),
)


def _folder(test):
  model = models.Transformer(_CONFIG, implementation="reference")
  params = applied.params(model)
  folder = pathlib.Path(test.create_tempdir().full_path) / "model"
  pretrained.save(folder, _CONFIG, params)
  return folder, params


class OwnFormTest(parameterized.TestCase):

  def test_a_config_is_read_back_from_json(self):
    for config in (
        _CONFIG,
        configs.authors_encoder(),
        configs.TransformerConfig(),
    ):
      fields = json.loads(json.dumps(own_form.to_fields(config)))
      self.assertEqual(config_json.from_hf(fields), config)

  def test_a_folder_is_read_back_to_the_bit(self):
    folder, params = _folder(self)
    config, loaded = pretrained.load(folder)
    self.assertEqual(config, _CONFIG)
    chex.assert_trees_all_equal(loaded, params)
    again = folder.parent / "again"
    pretrained.save(again, config, loaded, like=folder)
    for name in ("config.json", "model.safetensors"):
      self.assertEqual(
          (again / name).read_bytes(), (folder / name).read_bytes()
      )
    halves = pretrained.load(folder, "bfloat16")[1]
    self.assertEqual(halves["token_embed"]["embedding"].dtype, jnp.bfloat16)

  def test_a_family_cannot_say_it(self):
    with self.assertRaisesRegex(
        errors.UserError, "cannot say .*attention=.*; model_type=joma"
    ):
      config_json.to_hf(_CONFIG, "llama")

  @parameterized.parameters(
      (dict(num_layer=3), "has no field num_layer"),
      (dict(num_layers="3"), "num_layers must be like 4, got '3'"),
      (dict(num_layers=True), "num_layers must be like 4"),
      (dict(tie_embeddings=1), "tie_embeddings must be like True"),
      (dict(windows=3), "windows must be like"),
      (dict(rope=[1]), "rope must be a dictionary"),
      (dict(rope=dict(base=3)), "has no field rope.base"),
      (dict(attention=["hop"]), "no system 'hop'; the nearest is 'hip'"),
  )
  def test_what_is_wrong_is_told(self, fields, message):
    with self.assertRaisesRegex(errors.UserError, message):
      own_form.from_fields({"model_type": "joma", **fields})

  def test_missing_and_unexpected_tensors_are_named(self):
    folder, params = _folder(self)
    with self.assertRaisesRegex(errors.UserError, "no layers_0/attn/key"):
      broken = {**params["layers_0"]["attn"]}
      broken.pop("key")
      layer = {**params["layers_0"], "attn": broken}
      pretrained.save(folder, _CONFIG, {**params, "layers_0": layer})
    with self.assertRaisesRegex(errors.UserError, "extra, which the config"):
      pretrained.save(folder, _CONFIG, {**params, "extra": jnp.zeros(2)})
    fields = json.loads((folder / "config.json").read_text())
    fields["hidden_dim"] = 9
    (folder / "config.json").write_text(json.dumps(fields))
    with self.assertRaisesRegex(errors.UserError, r"of shape \[8, 8\]; the"):
      pretrained.load(folder)


if __name__ == "__main__":
  absltest.main()
