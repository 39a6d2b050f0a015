"""Vectors of texts beside those of each text read alone."""

import pathlib

from absl.testing import absltest
import jax
import numpy as np
import pytest

from joma.transformer import config as configs
from joma.transformer import model as models
from joma.transformer.checkpoints import embed
from joma.transformer.hf import pretrained
from joma.transformer.text import tokenizer
from scansnap_jax.experiment import errors
from tests.joma.transformer import applied

pytest.importorskip("safetensors.numpy")

_CONFIG = configs.TransformerConfig(
    vocab_size=256,
    num_layers=1,
    embed_dim=8,
    num_heads=2,
    num_kv_heads=2,
    head_dim=4,
    hidden_dim=12,
    max_len=8,
)
_LINES = ("to be", "or", "not to be, that is the question")


def _alone(model, params, line):
  """The last layer's states of one text, normed, [T, D]."""
  tokens = np.frombuffer(line.encode(), np.uint8).astype(np.int32)[None]
  _, seen = jax.jit(
      lambda params, tokens: model.apply(
          {"params": params}, tokens, mutable="intermediates"
      )
  )(params, tokens)
  x = np.float64(seen["intermediates"]["layers_0"]["resid_mlp"][0][0])
  size = np.sqrt(
      (x * x).mean(axis=-1, keepdims=True) + model.config.norm_epsilon
  )
  return x / size * np.float64(params["final_norm"]["scale"])


class EmbedTest(absltest.TestCase):

  def test_lines_are_those_read_alone_in_their_order(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    model = models.Transformer(_CONFIG)
    params = applied.params(model)
    scale = np.linspace(0.5, 2, 8, dtype=np.float32)
    params["final_norm"] = {"scale": jax.device_put(scale)}
    pretrained.save(folder, _CONFIG, params, family="llama")
    tokenizer.save(tokenizer.Bytes(), folder)
    for design, pool in (
        ("mean", lambda x: x.mean(axis=0)),
        ("eos", lambda x: x[-1]),
    ):
      found = embed.embed_lines(folder, _LINES, design, batch_size=2)
      for line, vector in zip(_LINES, found, strict=True):
        expected = pool(_alone(model, params, line))
        expected /= np.linalg.norm(expected)
        np.testing.assert_allclose(vector, expected, atol=1e-6)
    with self.assertRaisesRegex(errors.UserError, "line 2 .* has no token"):
      embed.embed_lines(folder, ("a", ""), "mean", 2)

  def test_what_has_no_direction_is_told_by_its_line(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    model = models.Transformer(_CONFIG)
    params = applied.params(model)
    embed_table = params["token_embed"]["embedding"]
    params["token_embed"]["embedding"] = embed_table.at[ord("c")].set(3e38)
    pretrained.save(folder, _CONFIG, params, family="llama")
    tokenizer.save(tokenizer.Bytes(), folder)
    with (
        jax.debug_nans(True),  # The mark of such a line is made on the host.
        self.assertRaisesRegex(errors.UserError, "Line 2 of .* has no vector"),
    ):
      embed.embed_lines(folder, ("a", "bc"), "mean", 2)


if __name__ == "__main__":
  absltest.main()
