"""Tests of Hugging Face folders, read and written."""

import functools
import json
import os
import pathlib
import unittest
import warnings

from absl.testing import absltest
from absl.testing import parameterized
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.transformer import model
from joma.transformer.hf import pretrained
from scansnap_jax.experiment.errors import UserError
from tests.joma.transformer import tiny_models
from tests.joma.transformer.hf import folders

safetensors_numpy = pytest.importorskip("safetensors.numpy")

_ROOT = pathlib.Path(__file__).parents[4]
_SHARED = pathlib.Path(os.environ.get("SCANSNAP_SHARED", _ROOT / "../shared"))
_GOLDENS = _SHARED / "models" / "hf_tiny"
# Of the largest logit; float32 of another order of summation is 1e-6 off.
_RTOL = 2e-5
_NUM_NEW = 64
# Each program runs once: half the time to compile it is time saved.
_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


class RoundTripTest(folders.FolderTestCase):

  @parameterized.parameters(*tiny_models.NAMES)
  def test_saved_loaded_and_saved_again_is_the_same(self, name):
    folder, config, params = self.saved(name)
    loaded_config, loaded = pretrained.load(folder)
    self.assertEqual(loaded_config, config)
    self.assert_same_trees(loaded, params)
    again = self.folder()
    pretrained.save(again, loaded_config, loaded, like=folder)
    self.assert_same_files(again, folder)

  @parameterized.parameters("bfloat16", "float16")
  def test_types_of_the_file(self, dtype):
    folder, config, params = self.saved("gpt_neox", dtype=dtype)
    _, stored = pretrained.load(folder, dtype=None)
    _, as_float32 = pretrained.load(folder)
    leaf = lambda tree: tree["layers_1"]["attn"]["query"]["kernel"]
    expected = leaf(params).astype(jnp.dtype(dtype))
    self.assertEqual(leaf(stored).dtype, dtype)
    np.testing.assert_array_equal(leaf(stored), expected)
    self.assertEqual(leaf(as_float32).dtype, jnp.float32)
    np.testing.assert_array_equal(leaf(as_float32), expected.astype(np.float32))
    self.assertEqual(_json(folder / "config.json")["dtype"], dtype)
    # What float32 holds exactly goes back to the same bytes.
    again = self.folder()
    pretrained.save(again, config, as_float32, dtype=dtype, like=folder)
    self.assert_same_files(again, folder)

  def test_shards_hold_what_one_file_holds(self):
    folder, config, params = self.saved("llama", max_shard_bytes=5000)
    shards = sorted(folder.glob("model-*.safetensors"))
    index = _json(folder / "model.safetensors.index.json")
    self.assertGreater(len(shards), 3)
    self.assertEqual(
        set(index["weight_map"].values()), {path.name for path in shards}
    )
    num_params = sum(x.size for x in jax.tree.leaves(params))
    self.assertEqual(index["metadata"]["total_size"], 4 * num_params)
    _, loaded = pretrained.load(folder)
    self.assert_same_trees(loaded, params)
    # One file takes the place of many: no shard is left to be read instead.
    pretrained.save(folder, config, params)
    self.assertEqual(
        sorted(os.listdir(folder)), ["config.json", "model.safetensors"]
    )

  def test_companions_are_copied_and_other_fields_kept(self):
    folder, config, params = self.saved("llama")
    fields = _json(folder / "config.json")
    fields.update(eos_token_id=7, initializer_range=0.5)
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    again = self.folder()
    pretrained.save(again, config, params, like=folder)
    self.assertEqual(_json(again / "config.json"), fields)
    self.assertEqual((again / "tokenizer.json").read_text(), "{}")
    self.assertEqual(_json(again / "generation_config.json")["eos_token_id"], 7)

  def test_a_folder_of_another_family_gives_only_its_token_ids(self):
    like, _, _ = self.saved("gpt2")
    fields = {**_json(like / "config.json"), "eos_token_id": 7}
    (like / "config.json").write_text(json.dumps(fields))
    _, config, params = self.saved("llama")
    folder = self.folder()
    pretrained.save(folder, config, params, family="llama", like=like)
    fields = _json(folder / "config.json")
    self.assertEqual(fields["eos_token_id"], 7)
    self.assertNotIn("n_embd", fields)

  def test_leaves_of_a_transposed_array_are_written_in_order(self):
    folder, config, params = self.saved("llama")
    turned = jax.tree.map(lambda x: np.asarray(x.T, order="C").T, params)
    again = self.folder()
    pretrained.save(again, config, turned)
    self.assert_same_files(again, folder)


class NamesOfOthersTest(folders.FolderTestCase):
  """Folders of other generations: the same model by other names."""

  def rewritten(self, name, change):
    folder, _, params = self.saved(name)
    path = folder / "model.safetensors"
    tensors = change(safetensors_numpy.load_file(path))
    safetensors_numpy.save_file(tensors, path)
    _, loaded = pretrained.load(folder)
    self.assert_same_trees(loaded, params)

  @parameterized.parameters(
      ("gpt2", "transformer."),
      ("opt", "model."),
      ("gpt_neox", "gpt_neox."),
      ("gemma", "model."),
  )
  def test_the_body_alone_leaves_out_the_prefix(self, name, prefix):
    self.rewritten(
        name,
        lambda tensors: {
            key.removeprefix(prefix): value for key, value in tensors.items()
        },
    )

  def test_output_layer_of_gpt_neox_has_two_names(self):
    self.rewritten(
        "gpt_neox",
        lambda tensors: {
            key.replace("embed_out", "lm_head"): value
            for key, value in tensors.items()
        },
    )

  @parameterized.parameters(
      ("gpt2", "transformer.h.0.attn.bias"),
      ("gpt2", "transformer.h.0.attn.masked_bias"),
      ("gpt_neox", "gpt_neox.layers.1.attention.bias"),
      ("gpt_neox", "gpt_neox.layers.1.attention.rotary_emb.inv_freq"),
      ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
  )
  def test_masks_and_frequencies_are_no_weights(self, name, key):
    mask = np.ones((1, 1, 4, 4), np.uint8)
    self.rewritten(name, lambda tensors: {**tensors, key: mask})

  def test_a_tied_output_layer_may_be_repeated(self):
    repeat = lambda tensors: {
        **tensors,
        "lm_head.weight": tensors["model.embed_tokens.weight"],
    }
    self.rewritten("gemma", repeat)
    self.rewritten("llama with biases, tied", repeat)


class SaveTest(folders.FolderTestCase):

  def test_parameters_that_do_not_fit_are_named(self):
    _, config, params = self.saved("llama")
    folder = self.folder()

    def check(message, change):
      flat = traverse_util.flatten_dict(params, sep="/")
      change(flat)
      with self.assertRaisesRegex(UserError, message):
        pretrained.save(
            folder, config, traverse_util.unflatten_dict(flat, sep="/")
        )

    key = "layers_1/attn/key/kernel"
    whole = lambda leaf: leaf.astype(np.int64)
    check(f"lack {key}", lambda flat: flat.pop(key))
    check(
        rf"{key} of shape \[24, 12\].*\[24, 2, 6\]",
        lambda flat: flat.update({key: flat[key].reshape(24, 12)}),
    )
    check("have x/y", lambda flat: flat.update({"x/y": np.ones(3)}))
    check(
        "dtype=int64.*bfloat16",
        lambda flat: flat.update({key: whole(flat[key])}),
    )
    # Nothing was written before the check.
    self.assertEqual(os.listdir(folder), [])

  def test_nothing_taken_over_changes_the_model(self):
    folder, config, params = self.saved("llama")
    fields = _json(folder / "config.json")
    (folder / "config.json").write_text(
        json.dumps({**fields, "quantization_config": {"bits": 4}})
    )
    again = self.folder()
    with self.assertRaisesRegex(UserError, "quantization_config"):
      pretrained.save(again, config, params, like=folder)
    self.assertEqual(os.listdir(again), [])


def _json(path):
  return json.loads(path.read_text())


def _greedy(config, params, prompt, num_tokens):
  """Returns a continuation and its logits, one full forward pass a token."""
  transformer = model.Transformer(config)
  length = prompt.shape[1] + num_tokens

  def step(i, tokens):
    logits = transformer.apply({"params": params}, tokens)
    best = jnp.argmax(logits[:, i - 1], axis=-1)
    return tokens.at[:, i].set(best.astype(tokens.dtype))

  def run(tokens):
    tokens = jax.lax.fori_loop(prompt.shape[1], length, step, tokens)
    return tokens, transformer.apply({"params": params}, tokens)

  tokens = np.zeros((len(prompt), length), np.int32)
  tokens[:, : prompt.shape[1]] = prompt
  return _jit(run)(tokens)


def _logits(config, params, tokens):
  transformer = model.Transformer(config)
  apply = _jit(lambda params, x: transformer.apply({"params": params}, x))
  return np.asarray(apply(params, jnp.asarray(tokens, jnp.int32)))


def _assert_close(actual, expected):
  atol = _RTOL * np.abs(expected).max()
  np.testing.assert_allclose(actual, expected, atol=atol, rtol=0)


def _transformers():
  """Imports the reference, or skips."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    try:
      import torch
      import transformers
    except ImportError as error:
      raise unittest.SkipTest(f"transformers with torch: {error}") from error
  # More threads than free cores wait for one another.
  torch.set_num_threads(1)
  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  return transformers, torch


@pytest.mark.filterwarnings("ignore")
class AgainstTransformersTest(folders.FolderTestCase):

  def theirs(self, name):
    """Returns a random model of theirs, and the folder that it saved."""
    transformers, torch = _transformers()
    folder = self.folder()
    fields = {
        **tiny_models.fields_of(name),
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }
    (folder / "config.json").write_text(json.dumps(fields))
    config = transformers.AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    reference = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager"
    ).eval()
    neutral = float("gemma" not in fields["model_type"])
    with torch.no_grad():
      for key, parameter in reference.named_parameters():
        is_scale = parameter.ndim == 1 and key.endswith("weight")
        parameter.copy_(0.15 * torch.randn_like(parameter))
        parameter.add_(neutral * is_scale)
    reference.save_pretrained(folder)
    return reference, folder

  def their_logits(self, reference, tokens):
    _, torch = _transformers()
    with torch.no_grad():
      return reference(torch.tensor(tokens)).logits.numpy()

  @parameterized.parameters(*tiny_models.FIELDS)
  def test_logits_are_theirs(self, name):
    reference, folder = self.theirs(name)
    tokens = np.random.default_rng(0).integers(0, 61, (2, 20))
    config, params = pretrained.load(folder)
    _assert_close(
        _logits(config, params, tokens), self.their_logits(reference, tokens)
    )

  @parameterized.parameters(*tiny_models.NAMES)
  @pytest.mark.slow
  def test_greedy_texts_are_theirs_and_they_read_what_was_saved(self, name):
    transformers, torch = _transformers()
    reference, folder = self.theirs(name)
    prompt = np.random.default_rng(1).integers(0, 61, (2, 8))
    expected = reference.generate(
        torch.tensor(prompt), max_new_tokens=_NUM_NEW, do_sample=False
    ).numpy()
    config, params = pretrained.load(folder)
    tokens, logits = _greedy(config, params, prompt, _NUM_NEW)
    np.testing.assert_array_equal(tokens, expected)
    expected_logits = self.their_logits(reference, expected)
    _assert_close(logits, expected_logits)
    saved = self.folder()
    pretrained.save(saved, config, params, like=folder)
    for again in (folder, saved):
      read = transformers.AutoModelForCausalLM.from_pretrained(
          again, attn_implementation="eager"
      ).eval()
      np.testing.assert_array_equal(
          self.their_logits(read, expected), expected_logits
      )


@pytest.mark.realdata
class GoldenTest(folders.FolderTestCase):

  @parameterized.parameters(
      "gpt2", "gpt_neox", "llama", "llama_pi_linear4", "llama_yarn4", "opt"
  )
  @pytest.mark.by_default(4)
  def test_logits_attention_and_hidden_states_are_theirs(self, name):
    folder = _GOLDENS / name
    if not folder.is_dir():
      self.skipTest("needs models/hf_tiny in SCANSNAP_SHARED")
    golden = np.load(folder / "golden.npz")
    config, params = pretrained.load(folder)
    transformer = model.Transformer(config)
    apply = _jit(
        lambda params, x: transformer.apply(
            {"params": params}, x, mutable="intermediates"
        )
    )
    logits, sown = apply(params, jnp.asarray(golden["ids"], jnp.int32))
    _assert_close(logits, golden["logits"])
    for layer in range(config.num_layers):
      sown_layer = sown["intermediates"][f"layers_{layer}"]
      _assert_close(
          sown_layer["attn"]["attn_weights"][0][:1], golden["attn"][layer]
      )
      # Theirs has the embeddings first, and the last one after the norm.
      if layer + 1 < config.num_layers:
        _assert_close(
            sown_layer["resid_mlp"][0][:1], golden["hidden"][layer + 1]
        )


if __name__ == "__main__":
  absltest.main()
