"""Scores and texts against calls of the model, one text at a time."""

import functools

from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np

from joma.inference import generate
from joma.inference.cache import kv_cache
from joma.inference.harness import requests
from joma.systems.cache_policies import names
from joma.transformer import config as configs
from joma.transformer import model as models
from joma.transformer.text import tokenizer
from tests.joma.transformer import applied

_SHAPE = configs.TransformerConfig(
    vocab_size=256,
    num_layers=1,
    embed_dim=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    hidden_dim=16,
    max_len=128,
)
_TEXTS = (b"once upon a time", b"no", b"twice as long as it should be")
_COUNTS = (5, 1, 11)
# Ten times the largest float32 error seen; likelihoods are of order 100.
_TOLERANCE = 1e-3


@functools.cache
def _model():
  model = models.Transformer(_SHAPE, implementation="reference")
  return model, jax.tree.map(lambda x: 3 * x, applied.params(model))


def _answerer(policy=None, capacity=0, eos_ids=()):
  model, params = _model()
  return requests.Answerer(
      model=model,
      params=params,
      tokenizer=tokenizer.Bytes(),
      policy=None if policy is None else names.parse(policy),
      capacity=capacity,
      eos_ids=eos_ids,
  )


@functools.cache
def _step():
  model, _ = _model()
  return jax.jit(
      lambda params, token, at, cache: model.apply(
          {"params": params}, token, positions=at, kv_cache=cache
      )
  )


def _by_token(text, count, cache):
  """Log-likelihood of a text's end in float64, a call a token."""
  _, params = _model()
  total, is_greedy = 0.0, True
  for at, token in enumerate(text[:-1]):
    logits, cache = _step()(
        params, jnp.array([[token]]), jnp.array([[at]]), cache
    )
    row = np.asarray(logits[0, 0], np.float64)
    if at >= len(text) - count - 1:
      total += row[text[at + 1]] - np.log(np.exp(row).sum())
      is_greedy &= int(row.argmax()) == text[at + 1]
  return total, is_greedy


class AnswererTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    # This compiles much and runs little.
    jax.config.update("jax_disable_most_optimizations", True)
    self.addCleanup(jax.config.update, "jax_disable_most_optimizations", False)

  def _check_scores(self, answerer, policy, capacity):
    ids = [list(text) for text in _TEXTS]
    # The last text ends as the model itself would go on.
    _, params = _model()
    cache = kv_cache.init(names.parse(policy), _SHAPE, 1, capacity)
    for at, token in enumerate(ids[1]):
      logits, cache = _step()(
          params, jnp.array([[token]]), jnp.array([[at]]), cache
      )
    ids.append([*ids[1], int(logits[0, 0].argmax())])
    counts = [*_COUNTS, 1]
    found = answerer.score(ids, counts)
    for text, count, (value, is_greedy) in zip(ids, counts, found, strict=True):
      cache = kv_cache.init(names.parse(policy), _SHAPE, 1, capacity)
      expected, expects_greedy = _by_token(text, count, cache)
      self.assertAlmostEqual(value, expected, delta=_TOLERANCE)
      self.assertEqual(is_greedy, expects_greedy)
    self.assertTrue(found[-1][1])
    self.assertFalse(found[0][1])
    return found

  def test_scores_are_those_of_single_tokens(self):
    whole = self._check_scores(_answerer(), "full", 40)
    less = self._check_scores(_answerer("window", 6), "window", 6)
    self.assertNotAlmostEqual(whole[2][0], less[2][0], delta=0.01)

  def test_texts_end_before_a_string(self):
    ids = [list(text) for text in _TEXTS[:2]]
    answerer = _answerer()
    bytes_ = tokenizer.Bytes()
    whole = [
        bytes_.decode(row)
        for row in generate.generate(*_model(), ids, max_new_tokens=20)
    ]
    self.assertEqual(answerer.say(ids, max_new_tokens=20), whole)
    stops = [whole[0][3], whole[1][5]]
    cut = [min((w.split(s)[0] for s in stops), key=len) for w in whole]
    found = answerer.say(ids, max_new_tokens=20, until=stops)
    self.assertEqual(found, cut)

  def test_a_token_that_ends_a_text_is_no_part_of_it(self):
    ids = [list(_TEXTS[0])]
    (row,) = generate.generate(*_model(), ids, max_new_tokens=9)
    stop = int(row[4])
    found = _answerer(eos_ids=(stop,)).say(ids, max_new_tokens=9)
    first = row.tolist().index(stop)
    self.assertEqual(found, [tokenizer.Bytes().decode(row[:first])])


if __name__ == "__main__":
  absltest.main()
