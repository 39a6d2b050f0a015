"""Tests that a saved folder opens in transformers' pipeline as it does here."""

import dataclasses
import warnings

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.transformer import model
from joma.transformer.hf import pretrained
from joma.transformer.text import tokenizer as tokenizers
from tests.joma.transformer import tiny_models
from tests.joma.transformer.hf import folders

_TEXT = "To be, or not to be: that is the question. " * 9
_NUM_NEW = 16


def _tokenizer(kind):
  if kind == "bytes":
    return tokenizers.Bytes()
  if kind == "words":
    return tokenizers.learn_words([_TEXT])
  return tokenizers.learn_bpe([_TEXT], 280)


def _greedy(config, params, ids):
  """Ids of a continuation, by one full pass a token."""
  transformer = model.Transformer(config)
  apply = jax.jit(lambda x: transformer.apply({"params": params}, x))
  tokens = np.zeros((1, len(ids) + _NUM_NEW), np.int32)
  tokens[0, : len(ids)] = ids
  for i in range(len(ids), tokens.shape[1]):
    tokens[0, i] = np.argmax(apply(tokens)[0, i - 1])
  return tokens[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
class PipelineTest(folders.FolderTestCase):

  @parameterized.product(
      family=("gpt2", "llama"), kind=("bytes", "words", "bpe")
  )
  def test_ids_and_greedy_text_are_the_same(self, family, kind):
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      pytest.importorskip("torch")
      transformers = pytest.importorskip("transformers")
    pytest.importorskip("tokenizers")
    ours, folder = _tokenizer(kind), self.folder()
    config = dataclasses.replace(
        tiny_models.config_of(family), vocab_size=ours.vocab_size
    )
    init = model.Transformer(config).init
    params = init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    # Larger weights, so that no two logits are near each other.
    params = jax.tree.map(
        lambda leaf: leaf * (3.0 if leaf.ndim > 1 else 1), params
    )
    pretrained.save(folder, config, params, family=family)
    tokenizers.save(ours, folder, config.max_len)
    prompt = "to be or "
    ids = _greedy(config, params, ours.encode(prompt))
    generate = transformers.pipeline("text-generation", model=str(folder))
    asked = {"max_new_tokens": _NUM_NEW, "do_sample": False}
    (found,) = generate(prompt, return_tensors=True, **asked)
    self.assertEqual(found["generated_token_ids"], ids.tolist())
    if kind != "words":  # Of which it joins full stops to the words before.
      (found,) = generate(prompt, **asked)
      self.assertEqual(found["generated_text"], ours.decode(ids))


if __name__ == "__main__":
  absltest.main()
