"""Protocols against what single calls of the model give, on a small model."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.inference import generate
from joma.inference.cache import kv_cache
from joma.inference.evaluation.protocols import reading
from joma.inference.evaluation.ruler import written
from joma.systems.cache_policies import names
from joma.transformer import config as configs
from joma.transformer import model as models
from scansnap_jax.experiment import errors
from tests.joma.transformer import applied

_SHAPE = configs.TransformerConfig(
    vocab_size=24,
    num_layers=1,
    embed_dim=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    hidden_dim=16,
    max_len=64,
)
_SIZES = reading.Sizes(context=12, question=4, answer=5)
_LENGTHS = ((12, 3), (6, 4))


@functools.cache
def _model():
  model = models.Transformer(_SHAPE, implementation="reference")
  # Sharp enough that what is kept changes what is said.
  return model, jax.tree.map(lambda x: 3 * x, applied.params(model))


def _texts():
  draws = np.random.default_rng(1)
  ids = lambda length: draws.integers(1, 24, length).astype(np.int32)
  return [written.Written(ids(t), ids(q)) for t, q in _LENGTHS]


class _Caches:

  def __init__(self, name):
    self._policy = names.parse(name)

  def __call__(self, batch_size, slots):
    return kv_cache.init(self._policy, _SHAPE, batch_size, slots)


def _setting(protocol, name="full", budget=1.0, eos_ids=()):
  return reading.Setting(protocol, budget, _Caches(name), _SIZES, eos_ids)


def _answer(setting, texts, num_new=5):
  return [
      np.asarray(row).tolist()
      for row in reading.answer(setting, *_model(), texts, num_new)
  ]


@functools.cache
def _program():
  model, _ = _model()
  return jax.jit(
      lambda params, token, position, cache: model.apply(
          {"params": params}, token, positions=position, kv_cache=cache
      )
  )


def _one_by_one(ids, start, cache, num_new):
  """Greedy continuation, a call of the model a token."""
  _, params = _model()
  said, ids = [], list(map(int, ids))
  for at in range(len(ids) + num_new - 1):
    token = ids[at] if at < len(ids) else said[-1]
    logits, cache = _program()(
        params,
        jnp.array([[token]], jnp.int32),
        jnp.array([[start + at]], jnp.int32),
        cache,
    )
    if at + 1 >= len(ids):
      said.append(int(logits[0, 0].argmax()))
  return said


def _read_at_once(ids, cache):
  _, params = _model()
  positions = jnp.arange(len(ids), dtype=jnp.int32)[None]
  logits, cache = _program()(params, jnp.asarray(ids)[None], positions, cache)
  return int(logits[0, -1].argmax()), cache


def _forgetting(cache, is_kept):
  """A full cache whose slots are emptied by position."""
  return tuple(
      layer.__class__(**{
          **vars(layer),
          "pos": jnp.where(is_kept(layer.pos), layer.pos, -1),
      })
      for layer in cache
  )


class ReadingTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    # This compiles much and runs little.
    jax.config.update("jax_disable_most_optimizations", True)
    self.addCleanup(jax.config.update, "jax_disable_most_optimizations", False)

  @parameterized.parameters("agnostic", "aware", "decoding")
  def test_with_all_kept_it_is_plain_generation(self, protocol):
    texts = _texts()
    wanted = [
        generate.generate(*_model(), [np.concatenate(text)], max_new_tokens=5)[
            0
        ].tolist()
        for text in texts
    ]
    self.assertEqual(_answer(_setting(protocol), texts), wanted)
    self.assertGreater(len({tuple(row) for row in wanted}), 1)

  def test_agnostic_forgets_of_the_context_alone(self):
    """The window's last half of each context, then all of what follows."""
    texts, wanted = _texts(), []
    for context, question in texts:
      cache = kv_cache.init(names.parse("full"), _SHAPE, 1, 32)
      _, cache = _read_at_once(context, cache)
      cut = len(context) - len(context) // 2
      cache = _forgetting(cache, lambda pos, cut=cut: pos >= cut)
      wanted.append(_one_by_one(question, len(context), cache, 5))
    found = _answer(_setting("agnostic", "window", 0.5), texts)
    self.assertEqual(found, wanted)
    self.assertNotEqual(found, _answer(_setting("agnostic"), texts))

  @parameterized.product(
      protocol=("agnostic", "aware"), scope=("layer", "model")
  )
  @pytest.mark.by_default(3)
  def test_heads_that_are_alike_keep_the_same_when_they_are_compared(
      self, protocol, scope
  ):
    """To a window all heads are alike, and their newest tokens stay."""
    setting = _setting(protocol, "window", 0.5)
    texts = _texts()
    found = _answer(setting._replace(scope=scope), texts)
    self.assertEqual(found, _answer(setting, texts))

  @pytest.mark.slow
  def test_aware_forgets_of_context_and_question(self):
    texts, wanted = _texts(), []
    for text in texts:
      ids = np.concatenate(text)
      cache = kv_cache.init(names.parse("full"), _SHAPE, 1, 32)
      first, cache = _read_at_once(ids, cache)
      cut = len(ids) - round(0.5 * len(ids))
      cache = _forgetting(cache, lambda pos, cut=cut: pos >= cut)
      wanted.append([first, *_one_by_one([first], len(ids), cache, 4)])
    found = _answer(_setting("aware", "window", 0.5), texts)
    self.assertEqual(found, wanted)
    self.assertNotEqual(found, _answer(_setting("aware"), texts))

  def test_decoding_evicts_from_the_first_token_on(self):
    texts = _texts()
    wanted = [
        _one_by_one(
            np.concatenate(text),
            0,
            kv_cache.init(names.parse("h2o"), _SHAPE, 1, 8),
            5,
        )
        for text in texts
    ]
    # Half of the longest, of 16 tokens.
    found = _answer(_setting("decoding", "h2o", 0.5), texts)
    self.assertEqual(found, wanted)
    self.assertNotEqual(found, _answer(_setting("decoding"), texts))

  @parameterized.parameters("agnostic", "aware", "decoding")
  @pytest.mark.slow
  def test_an_answer_ends_before_the_token_that_ends_it(self, protocol):
    texts = _texts()
    whole = _answer(_setting(protocol), texts)
    for place in (0, 2):
      stop = whole[0][place]
      found = _answer(_setting(protocol, eos_ids=(stop,)), texts)
      for said, all_ in zip(found, whole, strict=True):
        cut = all_.index(stop) if stop in all_ else len(all_)
        self.assertEqual(said, all_[:cut])

  @parameterized.parameters("agnostic", "aware")
  @pytest.mark.by_default(1)
  def test_fewer_tokens_are_the_first_ones(self, protocol):
    texts, setting = _texts(), _setting(protocol)
    whole = _answer(setting, texts)
    for number in (1, 3):
      found = _answer(setting, texts, number)
      self.assertEqual(found, [row[:number] for row in whole])

  @parameterized.parameters("agnostic", "aware")
  @pytest.mark.slow
  def test_what_is_read_twice_stands_once(self, protocol):
    """With room for the text alone nothing of request and repetition stays."""
    texts, request = _texts(), (7, 8, 9)
    setting = _setting(protocol, "kvzip", 0.99)._replace(request=request)
    self.assertEqual(reading.num_slots(protocol, 0.99, _SIZES) % 4, 0)
    found = _answer(setting, texts)
    self.assertEqual(found, _answer(_setting(protocol), texts))
    less = _answer(setting._replace(budget=0.25), texts)
    self.assertNotEqual(found, less)

  def test_what_shares_slots_out_cannot_keep_a_question_on_top(self):
    with self.assertRaisesRegex(errors.UserError, "protocol=decoding"):
      _answer(_setting("agnostic", "adakv:h2o", 0.5), _texts())


class TrimTest(absltest.TestCase):

  def test_the_greatest_stay_and_of_equal_ones_the_newest(self):
    (cache,) = kv_cache.init(names.parse("knorm:num_recent=0"), _ONE, 1, 6)
    score = jnp.array([[[3.0, 1.0, 2.0, 2.0, 5.0, 0.0]]])
    pos = jnp.array([[[0, 1, 2, 3, 4, -1]]], jnp.int32)
    cache = cache.__class__(**{**vars(cache), "score": score, "pos": pos})
    trim = lambda n: reading.trim(cache, jnp.array([n]), jnp.array([5])).pos
    np.testing.assert_array_equal(trim(3)[0, 0], [0, -1, -1, 3, 4, -1])
    np.testing.assert_array_equal(trim(6), pos)


_ONE = configs.TransformerConfig(
    vocab_size=5,
    num_layers=1,
    embed_dim=8,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    hidden_dim=8,
    max_len=64,
)


if __name__ == "__main__":
  absltest.main()
