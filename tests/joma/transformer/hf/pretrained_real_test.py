"""Real models through pretrained: they say what they are known to say."""

import hashlib
import json
import os
import pathlib
import struct
import subprocess
import sys
import tempfile
import unittest
import warnings

from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.inference import generate
from joma.transformer import model
from joma.transformer.hf import pretrained
from joma.transformer.layers import monarch
from joma.transformer.layers import projections
from joma.transformer.text import tokenizer

safetensors_numpy = pytest.importorskip("safetensors.numpy")

_ROOT = pathlib.Path(__file__).parents[4]
_SHARED = pathlib.Path(os.environ.get("SCANSNAP_SHARED", _ROOT / "../shared"))
_NUM_CHARS = 20_000
_WINDOW = 1024
# Its documentation prints the 256 tokens after <s>, at temperature 0:
# https://github.com/karpathy/llama2.c/blob/master/doc/stories260K.md
_STORY_START = "Once upon a time, there was a little girl named Lily."
_STORY_SHA256 = (
    "30b2ffb07967932a88bfdf5e23b517a6f4cfcf7231db9e537360d3c12a4e4d10"
)


def _needs(path):
  if not path.exists():
    raise unittest.SkipTest(f"needs {path.name} in SCANSNAP_SHARED")
  return path


def _greedy(config, params, prompt, num_tokens):
  (tokens,) = generate.generate(
      model.Transformer(config), params, [prompt], max_new_tokens=num_tokens
  )
  return tokens


def _llama2c_folder(path, folder):
  """Writes a checkpoint of llama2.c's first format as a folder."""
  content = path.read_bytes()
  names = ("dim", "hidden", "layers", "heads", "kv_heads", "vocab", "len")
  sizes = dict(zip(names, struct.unpack_from("<7i", content), strict=True))
  width, layers, hidden = sizes["dim"], sizes["layers"], sizes["hidden"]
  head_dim = width // sizes["heads"]
  kv_width = head_dim * sizes["kv_heads"]
  numbers = np.frombuffer(content, np.float32, offset=28)
  offset = 0

  def take(*shape):
    nonlocal offset
    offset += np.prod(shape)
    return numbers[offset - np.prod(shape) : offset].reshape(shape)

  def halves(kernel):
    # Its rotary pairs are neighbours; a folder's are half a head apart.
    pairs = kernel.reshape(layers, -1, head_dim // 2, 2, width)
    return pairs.swapaxes(2, 3).reshape(kernel.shape)

  tensors = {"model.embed_tokens.weight": take(sizes["vocab"], width)}
  stacks = {
      "input_layernorm": take(layers, width),
      "self_attn.q_proj": halves(take(layers, width, width)),
      "self_attn.k_proj": halves(take(layers, kv_width, width)),
      "self_attn.v_proj": take(layers, kv_width, width),
      "self_attn.o_proj": take(layers, width, width),
      "post_attention_layernorm": take(layers, width),
      "mlp.gate_proj": take(layers, hidden, width),
      "mlp.down_proj": take(layers, width, hidden),
      "mlp.up_proj": take(layers, hidden, width),
  }
  for name, stack in stacks.items():
    for layer in range(layers):
      key = f"model.layers.{layer}.{name}.weight"
      tensors[key] = np.ascontiguousarray(stack[layer])
  tensors["model.norm.weight"] = take(width)
  safetensors_numpy.save_file(tensors, folder / "model.safetensors")
  fields = {
      "model_type": "llama",
      "hidden_size": width,
      "intermediate_size": hidden,
      "num_hidden_layers": layers,
      "num_attention_heads": sizes["heads"],
      "num_key_value_heads": sizes["kv_heads"],
      "vocab_size": sizes["vocab"],
      "max_position_embeddings": sizes["len"],
      "rms_norm_eps": 1e-5,
      "tie_word_embeddings": True,
  }
  (folder / "config.json").write_text(json.dumps(fields))


def _llama2c_words(path):
  content = path.read_bytes()
  words, offset = [], 4
  while offset < len(content):
    (length,) = struct.unpack_from("<i", content, offset + 4)
    words.append(content[offset + 8 : offset + 8 + length].decode())
    offset += 8 + length
  return words


@pytest.mark.realdata
@pytest.mark.slow
class Stories260KTest(absltest.TestCase):

  def test_tells_the_known_story_word_for_word(self):
    source = _needs(_SHARED / "models" / "stories260k")
    folder = pathlib.Path(self.create_tempdir().full_path)
    _llama2c_folder(source / "stories260K.bin", folder)
    config, params = pretrained.load(folder)
    tokens = _greedy(config, params, np.array([1]), 256)
    words = _llama2c_words(source / "tok512.bin")
    story = "".join(words[token] for token in tokens).strip()
    story = story.replace("<0x0A>", "\n")
    self.assertStartsWith(story, _STORY_START)
    self.assertEqual(
        hashlib.sha256(story.encode()).hexdigest(), _STORY_SHA256, story
    )


@pytest.mark.realdata
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
class SmolLm2Test(absltest.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    script = _needs(_SHARED / "tools" / "smollm2_folder.py")
    _needs(_SHARED / "models" / "smollm2-135m-instruct-q4_1")
    cls.temporary = tempfile.TemporaryDirectory()
    cls.folder = pathlib.Path(cls.temporary.name)
    subprocess.run(
        [sys.executable, script, cls.folder, "f32"],
        check=True,
        capture_output=True,
    )
    cls.config, cls.params = pretrained.load(cls.folder)
    cls.tokenizer = tokenizer.from_folder(cls.folder)

  @classmethod
  def tearDownClass(cls):
    cls.temporary.cleanup()
    super().tearDownClass()

  def test_knows_the_capital_of_france(self):
    prompt = self.tokenizer.encode("The capital of France is")
    tokens = _greedy(self.config, self.params, np.asarray(prompt), 2)
    self.assertEqual(self.tokenizer.decode(tokens), " Paris.")

  def test_a_projection_leaves_out_the_last_singular_values(self):
    sizes = projections.Monarch(blocks=4, rank=32)
    matrix = np.asarray(self.params["layers_7"]["mlp"]["up"]["kernel"])
    wide = matrix.astype(np.float64)
    right, left, discarded = monarch.project(wide, sizes)
    self.assertEqual(discarded.shape, (4, 4, 144 - 32))
    made = np.einsum("apjr,jars->apsj", right, left).reshape(matrix.shape)
    off = np.sum(np.square(made - wide))
    np.testing.assert_allclose(off, np.sum(discarded**2), rtol=1e-5)
    # By no more numbers than a matrix of rank 128, and less near than that.
    values = np.linalg.svd(wide, compute_uv=False)
    self.assertGreater(off, np.sum(values[128:] ** 2))

  def test_perplexity_is_that_of_transformers(self):
    text = _needs(_SHARED / "data" / "wikitext-2-raw" / "wiki.test.raw")
    text = text.read_text(encoding="utf-8")[:_NUM_CHARS]
    tokens = np.asarray(self.tokenizer.encode(text), np.int32)
    windows = [tokens[i : i + _WINDOW] for i in range(0, len(tokens), _WINDOW)]
    transformer = model.Transformer(self.config)
    apply = jax.jit(lambda p, x: transformer.apply({"params": p}, x))

    def ours(window):
      # What follows a token does not change its logits.
      padded = np.pad(window, (0, _WINDOW - len(window)))
      return apply(self.params, padded[None])[0, : len(window)]

    perplexity = self.perplexity(windows, ours)
    expected = self.perplexity(windows, self.their_logits())
    self.assertAlmostEqual(perplexity, expected, delta=1e-3)

  def perplexity(self, windows, logits_of):
    @jax.jit
    def losses(logits, targets):
      log_probs = jax.nn.log_softmax(logits[:-1])
      return -jnp.take_along_axis(log_probs, targets[1:, None], axis=1)

    losses = [
        np.asarray(losses(jnp.asarray(logits_of(window)), window), np.float64)
        for window in windows
    ]
    return np.exp(np.concatenate(losses).mean())

  def their_logits(self):
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      try:
        import torch
        import transformers
      except ImportError as error:
        self.skipTest(f"transformers with torch: {error}")
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        self.folder, dtype=torch.float32
    ).eval()

    def theirs(window):
      with torch.no_grad():
        tokens = torch.tensor(window.astype(np.int64))[None]
        return reference(tokens).logits[0].numpy()

    return theirs


if __name__ == "__main__":
  absltest.main()
