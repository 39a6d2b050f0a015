"""With a draft: the tokens, and the caches, of one step after the other."""

import dataclasses
import itertools

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.inference import generate
from joma.inference import sampling_config
from joma.inference.cache import calls
from joma.inference.cache import kv_cache
from joma.inference.speculative import draft_config
from joma.inference.speculative import drafts
from joma.inference.speculative import streaming
from joma.systems.cache_policies import names
from joma.transformer import config as configs
from joma.transformer import full_cache
from joma.transformer import model as models
from scansnap_jax.experiment import errors
from tests.joma.transformer import applied
from tests.laws import policies_test

_CONFIG = configs.TransformerConfig(
    vocab_size=50,
    num_layers=2,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    hidden_dim=24,
)
_MODEL = models.Transformer(_CONFIG, implementation="reference")
_PROMPTS = [[3, 1, 4, 1, 5, 3, 1], [9], [2, 6, 5, 3, 5, 8, 9, 2, 6, 5]]
_OWN = ("quest", "kivi", "think", "adakv")
_POLICIES = [name for name in names.POLICIES if name not in _OWN]


def _params(seed=5, mixed=0.0):
  """Wider than at the start of training; `mixed` with others is a draft."""
  make = lambda seed: applied.params(_MODEL, seed)
  return jax.tree.map(
      lambda x, y: 3 * x + mixed * y, make(seed), make(seed + 1)
  )


def _rows(steps, num_rows):
  rows = [[] for _ in range(num_rows)]
  for tokens, is_new in steps:
    for row in np.flatnonzero(is_new):
      rows[row].append(int(tokens[row]))
  return rows


def _ngram(**sizes):
  return drafts.of(draft_config.NGram(**{"n": 2, "least": 1, "k": 3} | sizes))


def _of_model(k=3):
  return drafts.of(draft_config.Model(k=k), _MODEL)


def _caches(name, num_rows=3):
  policy = names.parse(policies_test._SIZED.get(name, name))
  capacity = 8 if policy.evicts and not policy.reads_part else 64
  policy = calls.fitted(policy, capacity)
  return kv_cache.init(policy, _CONFIG, num_rows, capacity)


class StreamingTest(parameterized.TestCase):

  def test_greedy_tokens_and_an_evicting_cache_are_those_of_steps(self):
    self._check_policy("h2o", _ngram(), None)

  @parameterized.parameters(*_POLICIES)
  @pytest.mark.slow
  def test_every_policy_whose_slots_can_be_put_back(self, name):
    self._check_policy(name, _ngram(), None)
    self._check_policy(name, _of_model(), _params(mixed=0.3))

  def _check_policy(self, name, draft, draft_params):
    options = {"max_new_tokens": 25}
    steps = generate.stream(
        _MODEL, _params(), _PROMPTS, kv_cache=_caches(name), **options
    )
    want = _rows(steps, 3)
    got = streaming.stream(
        _MODEL,
        _params(),
        _PROMPTS,
        draft,
        draft_params,
        kv_cache=_caches(name),
        **options,
    )
    self.assertEqual(_rows(got, 3), want)
    self.assertGreater(got.num_yielded, got.num_passes)
    for found, wanted in zip(got.kv_cache, steps.last.kv_cache, strict=True):
      np.testing.assert_array_equal(found.pos, wanted.pos)
      chex.assert_trees_all_close(found, wanted, atol=1e-5)

  @parameterized.product(
      prompts=(_PROMPTS, [[9]]), max_new_tokens=(1, 2, 19), k=(1, 5)
  )
  @pytest.mark.slow
  def test_a_cache_that_keeps_everything(self, prompts, max_new_tokens, k):
    options = {"max_new_tokens": max_new_tokens}
    want = generate.generate(_MODEL, _params(), prompts, **options)
    for draft, params in ((_ngram(k=k), None), (_of_model(k), _params())):
      got = streaming.stream(
          _MODEL, _params(), prompts, draft, params, **options
      )
      rows = _rows(got, len(prompts))
      np.testing.assert_equal(rows, [row.tolist() for row in want])

  @pytest.mark.slow
  def test_a_model_that_drafts_for_itself_is_always_right(self):
    got = streaming.stream(
        _MODEL, _params(), _PROMPTS, _of_model(4), _params(), max_new_tokens=16
    )
    _rows(got, 3)
    # One by the prompt, then three times four guesses and one.
    self.assertEqual((got.num_rounds, got.num_yielded), (3, 3 * 15))
    self.assertStartsWith(
        got.summary(), "4.00 guesses accepted a step (36 of 36)"
    )

  @pytest.mark.slow
  def test_a_sequence_ends_at_its_end_of_text_within_a_round(self):
    plain = generate.generate(_MODEL, _params(), _PROMPTS, max_new_tokens=20)
    for eos in {int(token) for row in plain for token in row}:
      options = {"max_new_tokens": 20, "eos_ids": (eos,)}
      steps = generate.stream(
          _MODEL, _params(), _PROMPTS, kv_cache=_caches("h2o"), **options
      )
      want = _rows(steps, 3)
      got = streaming.stream(
          _MODEL,
          _params(),
          _PROMPTS,
          _of_model(5),
          _params(),
          kv_cache=_caches("h2o"),
          **options,
      )
      self.assertEqual(_rows(got, 3), want)
      for found, wanted in zip(got.kv_cache, steps.last.kv_cache, strict=True):
        np.testing.assert_array_equal(found.pos, wanted.pos)

  @parameterized.parameters("ngram", "model")
  @pytest.mark.slow
  def test_drawn_pairs_have_the_models_probabilities(self, kind):
    """The first three tokens, of 3,000 sequences that begin alike."""
    num_rows, config = 3_000, dataclasses.replace(_CONFIG, vocab_size=3)
    model = _MODEL.clone(config=config)
    params = jax.tree.map(lambda x: 4 * x, applied.params(model, 1))
    other = jax.tree.map(lambda x: 4 * x, applied.params(model, 2))
    sampler = sampling_config.SamplingConfig(temperature=1.0, seed=3)
    draft, prompt = _ngram(k=2), [0, 1, 2, 0, 1]
    if kind == "model":
      draft = drafts.of(draft_config.Model(k=2), model)
    steps = streaming.stream(
        model,
        params,
        [prompt] * num_rows,
        draft,
        other,
        max_new_tokens=3,
        sampler=sampler,
        kv_cache=full_cache.init(config, num_rows, 8),
    )
    rows = np.array(_rows(steps, num_rows))
    apply = jax.jit(model.apply)
    probs = lambda text: np.asarray(
        jax.nn.softmax(apply({"params": params}, jnp.array([text]))[0, -1])
    )
    for text in itertools.product(range(3), repeat=3):
      want = np.prod([probs([*prompt, *text[:i]])[text[i]] for i in range(3)])
      share = (rows == np.array(text)).all(axis=1).mean()
      # Five deviations: one of 27 errs in a run of 60,000.
      error = 5 * np.sqrt(want * (1 - want) / num_rows)
      self.assertAlmostEqual(share, want, delta=error, msg=str(text))

  def test_what_cannot_give_back_or_has_no_room_is_refused(self):
    options = {"max_new_tokens": 9}
    stream = lambda caches, **more: streaming.stream(
        _MODEL, None, [[1]], _ngram(), kv_cache=caches, **options | more
    )
    quest = kv_cache.init(names.parse("quest:num_keys=16"), _CONFIG, 1, 32)
    with self.assertRaisesRegex(errors.UserError, "0, quest, cannot give"):
      stream(quest)
    full = kv_cache.init(names.parse("full"), _CONFIG, 1, 8)
    with self.assertRaisesRegex(errors.UserError, "holds 8 positions"):
      stream(full)
    with self.assertRaisesRegex(errors.UserError, "max_new_tokens must be at"):
      stream(None, max_new_tokens=0)


if __name__ == "__main__":
  absltest.main()
