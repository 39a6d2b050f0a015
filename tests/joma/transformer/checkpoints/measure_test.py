"""Tests of the parts of `launch.inspect_lm`."""

import os
import pathlib
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.transformer import config as configs
from joma.transformer import inspection_config
from joma.transformer import model as models
from joma.transformer.checkpoints import measure
from joma.transformer.hf import pretrained
from joma.transformer.text import tokenizer
from scansnap_jax.experiment import errors
from tests.joma.transformer import applied

safetensors_numpy = pytest.importorskip("safetensors.numpy")

_MODEL = configs.TransformerConfig(
    vocab_size=256,
    num_layers=1,
    embed_dim=8,
    num_heads=2,
    num_kv_heads=2,
    head_dim=4,
    hidden_dim=12,
    max_len=8,
)


def save_model(folder, seed=0):
  """Saves a tiny Llama that reads bytes."""
  params = applied.params(models.Transformer(_MODEL), seed)
  pretrained.save(folder, _MODEL, params, family="llama")
  tokenizer.save(tokenizer.Bytes(), folder)


class FindModelsTest(absltest.TestCase):

  def test_commas_repeats_and_patterns_by_number(self):
    root = pathlib.Path(self.create_tempdir().full_path)
    for name in ("step2", "step10", "step1"):
      (root / name).mkdir()
    found = measure.find_models([f"a,{root}/step*", "b"])
    self.assertEqual(
        [path.name for path in found], ["a", "step1", "step2", "step10", "b"]
    )
    with self.assertRaisesRegex(errors.UserError, "fits no folder"):
      measure.find_models([f"{root}/x*"])

  def test_a_folder_is_meant_by_its_own_name(self):
    root = pathlib.Path(self.create_tempdir().full_path)
    for name in ("a,b", "c[1]", "~d"):
      (root / name).mkdir()
      found = measure.find_models([str(root / name)])
      self.assertEqual(found, [root / name])

  def test_among_others_and_around_patterns_names_are_what_is_there(self):
    root = pathlib.Path(self.create_tempdir().full_path)
    for name in ("a,b", "a", "c[1]/step2", "c[1]/step10", "c1/step3"):
      (root / name).mkdir(parents=True)
    value = f"{root}/a, {root}/a,b,{root}/c[1]/step*"
    self.assertEqual(
        measure.find_models([value]),
        [root / n for n in ("a", "a,b", "c[1]/step2", "c[1]/step10")],
    )

  def test_the_home_folder_is_found(self):
    root = pathlib.Path(self.create_tempdir().full_path)
    (root / "step1").mkdir()
    with mock.patch.dict(os.environ, HOME=str(root)):
      for name in ("~/step1", "~/step*"):
        self.assertEqual(measure.find_models([name]), [root / "step1"])


class ReadTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.create_tempdir().full_path)

  def _read(self, **changes):
    config = inspection_config.InspectionConfig(**changes)
    return measure.read_all([self.root / "model"], config)

  def test_ids_that_are_none_are_refused(self):
    save_model(self.root / "model")
    path = self.root / "ids.npz"
    for arrays, message in (
        ({"tokens": [[1]]}, "no array ids; it has tokens"),
        ({"ids": [1, 2]}, r"whole numbers \[B, T\], got int64 \[2\]"),
        ({"ids": [[0.5]]}, "whole numbers"),
        ({"ids": [[3, 256]]}, r"model: Token 256 at \[0, 1\]"),
        ({"ids": np.zeros((0, 3), int)}, "no token to read"),
        ({"ids": np.array([["a"]], object)}, "no readable .npz"),
    ):
      np.savez(path, **arrays)
      with self.assertRaisesRegex(errors.UserError, message):
        self._read(ids=str(path))
    path.write_text("no archive")
    with self.assertRaisesRegex(errors.UserError, "no readable .npz"):
      self._read(ids=str(path))
    np.save(self.root / "ids.npy", [[1]])
    with self.assertRaisesRegex(errors.UserError, "ids.npy is no readable"):
      self._read(ids=str(self.root / "ids.npy"))
    with self.assertRaisesRegex(errors.UserError, "No such file"):
      self._read(ids=str(self.root / "absent.npz"))

  def test_texts_that_are_none_are_refused(self):
    save_model(self.root / "model")
    path = self.root / "text.txt"
    for content, message in (
        (b" \n", "text.txt is empty"),
        (b"\xff\xfe", "is not UTF-8"),
    ):
      path.write_bytes(content)
      with self.assertRaisesRegex(errors.UserError, message):
        self._read(text=str(path))
    path.write_text("Éa")
    (ids,) = self._read(text=str(path))
    np.testing.assert_array_equal(ids, [list("Éa".encode())])
    (self.root / "model" / "tokenizer.json").unlink()
    with self.assertRaisesRegex(errors.UserError, "tokenizer.json"):
      self._read(text=str(path))

  def test_logits_of_several_models_are_refused(self):
    config = inspection_config.InspectionConfig(ids="x", logits_out="y.npy")
    with self.assertRaisesRegex(errors.UserError, "one model, got 2"):
      measure.read_all([pathlib.Path("a"), pathlib.Path("b")], config)

  def test_updates_of_one_model_are_refused(self):
    config = inspection_config.InspectionConfig(
        ids="x", probes=("update_rank",)
    )
    with self.assertRaisesRegex(errors.UserError, "compares models with the"):
      measure.read_all([pathlib.Path("a")], config)

  def test_settings_that_contradict_are_refused(self):
    for changes, message in (
        ({"ids": "a", "text": "b"}, "not both"),
        ({"logits_out": "y.npz"}, "must end in .npy"),
        ({"window": 0}, "window must be at least 1"),
    ):
      with self.assertRaisesRegex(errors.UserError, message):
        inspection_config.InspectionConfig(**changes)


class FitTest(parameterized.TestCase):

  @parameterized.parameters(
      # A text is cut where the model's positions end.
      ({"text": "t"}, "rotary", 20, (20, 8)),
      ({"text": "t", "window": 9}, "rotary", 20, (20, 9)),
      ({"text": "t", "window": 9}, "learned", 20, (20, 8)),
      ({"text": "t", "window": 3, "max_windows": 2}, "rotary", 20, (6, 3)),
      ({"text": "t", "window": 3, "max_windows": 0}, "rotary", 20, (20, 3)),
      ({"text": "t"}, "rotary", 5, (5, 5)),
      # Ids are read as they are, if the model can.
      ({"ids": "i"}, "rotary", 20, (20, 20)),
      ({"ids": "i"}, "learned", 20, (20, 8)),
      ({"ids": "i", "window": 4, "max_windows": 1}, "rotary", 20, (20, 4)),
  )
  def test_lengths(self, changes, positions, num_tokens, expected):
    config = inspection_config.InspectionConfig(**changes)
    model = configs.TransformerConfig(max_len=8, positions=positions)
    ids, window = measure.fit(np.zeros((2, num_tokens), int), model, config)
    self.assertEqual((ids.shape[1], window), expected)


class MeasureTest(absltest.TestCase):

  @pytest.mark.slow
  def test_a_model_that_fails_is_named_and_costs_no_other(self):
    root = pathlib.Path(self.create_tempdir().full_path)
    folders = [root / name for name in ("fine", "nan", "large")]
    for folder in folders:
      save_model(folder)
    for name, value in (("nan", np.nan), ("large", 3e38)):
      path = root / name / "model.safetensors"
      tensors = safetensors_numpy.load_file(path)
      tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = value
      safetensors_numpy.save_file(tensors, path)
    config = inspection_config.InspectionConfig(ids="x")
    texts = [np.array([[5, 6, 7, 8]])] * 3
    found = measure.measure_each(folders, texts, config)
    self.assertEqual(
        [model["name"] for model in found], ["fine", "nan", "large"]
    )
    self.assertNotIn("failed", found[0])
    self.assertRegex(found[1]["failed"], "up_proj.weight.* holds nan")
    self.assertRegex(found[2]["failed"], "large: .* is NaN or infinite")
    with self.assertRaisesRegex(errors.UserError, "holds nan"):
      measure.measure_each(folders[1:], texts[1:], config)

  @pytest.mark.slow
  def test_logits_are_written_whole(self):
    root = pathlib.Path(self.create_tempdir().full_path)
    save_model(root / "model")
    ids = np.array([[5, 6, 7, 8], [9, 9, 0, 255]])
    config = inspection_config.InspectionConfig(
        ids="x", logits_out=str(root / "new" / "logits.npy")
    )
    found = measure.measure(root / "model", ids, config)
    self.assertEqual((found["name"], found["window"]), ("model", 4))
    logits = np.load(root / "new" / "logits.npy")
    _, params = pretrained.load(root / "model")
    apply = jax.jit(models.Transformer(_MODEL).apply)
    expected = apply({"params": params}, jnp.asarray(ids))
    self.assertEqual(logits.dtype, np.float32)
    # Rounding of float32 logits of size 3.
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    self.assertEqual([*(root / "new").glob(".*")], [])


if __name__ == "__main__":
  absltest.main()
