"""Folders that are damaged, or are none: refused by name."""

import json
import os
import struct

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
import pytest

from joma.transformer.hf import pretrained
from scansnap_jax.experiment.errors import UserError
from tests.joma.transformer.hf import folders

safetensors_numpy = pytest.importorskip("safetensors.numpy")


class DamagedTest(folders.FolderTestCase):

  def check(self, folder, message):
    with self.assertRaisesRegex(UserError, message):
      pretrained.load(folder)

  def changed(self, name, change):
    folder, _, _ = self.saved(name)
    path = folder / "model.safetensors"
    tensors = safetensors_numpy.load_file(path)
    change(tensors)
    safetensors_numpy.save_file(tensors, path)
    return folder

  def test_missing_tensors(self):
    folder = self.changed(
        "llama", lambda t: t.pop("model.layers.1.mlp.up_proj.weight")
    )
    self.check(folder, f"{folder}.*layers.1.mlp.up_proj.weight")

  def test_a_missing_output_layer_asks_for_the_tie(self):
    folder = self.changed("llama", lambda t: t.pop("lm_head.weight"))
    self.check(folder, "lm_head.weight.*tie_word_embeddings")

  def test_unexpected_tensors(self):
    extra = {"model.layers.0.self_attn.q_norm.weight": np.ones(6)}
    folder = self.changed("llama", lambda t: t.update(extra))
    self.check(folder, "model.safetensors has .*q_norm.weight")

  def test_layers_beyond_the_last(self):
    folder, _, _ = self.saved("llama")
    fields = _json(folder / "config.json")
    (folder / "config.json").write_text(
        json.dumps({**fields, "num_hidden_layers": 1})
    )
    self.check(folder, "model.layers.1.*and 5 more")

  def test_tensors_of_another_shape(self):
    name = "model.layers.0.self_attn.k_proj.weight"
    folder = self.changed("llama", lambda t: t.update({name: t[name].T}))
    self.check(folder, rf"{name} of .*\[24, 12\].*\[12, 24\]")

  def test_a_tied_output_layer_that_differs(self):
    def change(tensors):
      other = tensors["model.embed_tokens.weight"].copy()
      other[3, 4] += 1
      tensors["lm_head.weight"] = other

    folder = self.changed("gemma", change)
    self.check(folder, "lm_head.weight.*model.embed_tokens.weight.*false")

  @parameterized.product(
      value=[np.nan, np.inf, -np.inf], dtype=["float32", "bfloat16"]
  )
  def test_what_is_not_finite_is_named_with_its_place(self, value, dtype):
    name = "model.layers.1.mlp.up_proj.weight"

    def change(tensors):
      tensors[name] = tensors[name].astype(dtype)
      tensors[name][3, 2] = value

    folder = self.changed("llama", change)
    self.check(folder, rf"{name} of {folder}/.* holds {value:g} at \[3, 2\]")

  def test_what_the_wanted_numbers_cannot_hold_is_named(self):
    name = "model.norm.weight"

    def change(tensors):
      tensors[name][1] = 1e5

    folder = self.changed("llama", change)
    pretrained.load(folder)
    with self.assertRaisesRegex(
        UserError, f"{name}.* 100000 at .*float16 cannot"
    ):
      pretrained.load(folder, "float16")

  def test_own_tensors_are_looked_at_too(self):
    _, config, params = self.saved("llama")
    params["final_norm"]["scale"] = np.full_like(
        params["final_norm"]["scale"], np.inf
    )
    folder = self.folder()
    pretrained.save(folder, config, params, family="joma")
    self.check(folder, r"final_norm/scale .* holds inf at \[0\]")

  def test_whole_numbers_are_no_weights(self):
    name = "model.norm.weight"
    folder = self.changed(
        "llama", lambda t: t.update({name: t[name].astype(np.int8)})
    )
    self.check(folder, f"{name} of .* holds I8.*dequantized")

  @parameterized.parameters(0, 5, 200, -8)
  def test_truncated_files(self, length):
    folder, _, _ = self.saved("llama")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    self.check(folder, f"{path} .*bytes.*no complete safetensors")

  @parameterized.parameters(
      struct.pack("<Q", 10**15) + b"{}",
      struct.pack("<Q", 8) + b"not json",
      b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 1\n",
  )
  def test_bad_headers(self, content):
    folder, _, _ = self.saved("llama")
    (folder / "model.safetensors").write_bytes(content)
    self.check(folder, "model.safetensors .*no complete safetensors")

  @parameterized.parameters("pytorch_model.bin", "consolidated.00.pth")
  def test_pickles_are_refused_with_the_reason(self, name):
    folder, _, _ = self.saved("llama")
    os.rename(folder / "model.safetensors", folder / name)
    self.check(folder, f"{name} is a pickle.*runs.*code")
    self.check(folder / name, f"{name} is a pickle")

  def test_folders_that_are_none(self):
    folder, _, _ = self.saved("llama")
    self.check(folder / "absent", "no folder .*absent.*org/name")
    self.check(folder / "config.json", "config.json is a file")
    (folder / "model.safetensors").unlink()
    self.check(folder, "neither model.safetensors nor .*it has config.json")
    (folder / "config.json").unlink()
    self.check(folder, "no config.json; it has nothing")

  @parameterized.parameters(("{", "not JSON"), ("[]", "a JSON object"))
  def test_config_that_is_none(self, content, message):
    folder, _, _ = self.saved("llama")
    (folder / "config.json").write_text(content)
    self.check(folder, f"config.json .*{message}")

  def test_config_that_is_not_supported_names_the_file(self):
    folder, _, _ = self.saved("llama")
    fields = _json(folder / "config.json")
    (folder / "config.json").write_text(
        json.dumps({**fields, "hidden_act": "mish"})
    )
    self.check(folder, f"{folder}/config.json: hidden_act='mish'")

  def test_an_index_that_disagrees_with_its_files(self):
    folder, _, _ = self.saved("llama", max_shard_bytes=5000)
    path = folder / "model.safetensors.index.json"
    index = _json(path)
    weight_map = index["weight_map"]
    first = weight_map["model.embed_tokens.weight"]

    def check(message, **changes):
      path.write_text(json.dumps({"weight_map": {**weight_map, **changes}}))
      self.check(folder, message)

    check("x.safetensors, which is not there", extra="x.safetensors")
    check(f"tensor extra is in {first}", extra=first)
    check("no file of its own", extra="../other.safetensors")
    check("pickle", extra="pytorch_model.bin")
    path.write_text(json.dumps({"weight_map": {}}))
    self.check(folder, "no weight_map")

  def test_types_that_are_none(self):
    folder, config, params = self.saved("llama")
    with self.assertRaisesRegex(UserError, "dtype=int8.*bfloat16"):
      pretrained.load(folder, dtype="int8")
    with self.assertRaisesRegex(UserError, "dtype=half-ish.*bfloat16"):
      pretrained.save(folder, config, params, dtype="half-ish")


def _json(path):
  return json.loads(path.read_text())


if __name__ == "__main__":
  absltest.main()
