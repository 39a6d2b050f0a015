"""Reading through caches against reading at once, and recall by hand."""

import functools
import itertools
import types

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.inference.cache import kv_cache as kv_cache_lib
from joma.inference.evaluation import evaluate
from joma.inference.evaluation import tasks
from joma.systems.cache_policies.by_place import full
from joma.systems.cache_policies.by_place import window
from joma.transformer import config as configs
from joma.transformer import full_cache
from joma.transformer import layer_hooks
from joma.transformer import model as models
from joma.transformer.layers import cross_entropy
from scansnap_jax.experiment import errors
from tests.joma.transformer import applied

# Sums of float32 in another order.
_TOLERANCE = 1e-5
_LENGTH = 10
_CONFIG = configs.TransformerConfig(
    vocab_size=23,
    num_layers=1,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    hidden_dim=16,
    max_len=32,
)
_MODEL = models.Transformer(_CONFIG)
_SHAPE = (2, _LENGTH)


@functools.cache
def _params():
  return applied.params(_MODEL)


def _texts():
  generator = np.random.default_rng(0)
  tokens = generator.integers(0, 23, _SHAPE).astype(np.int32)
  return tokens, np.array([_LENGTH, 7], np.int32)


def _logits(tokens):
  return _MODEL.apply({"params": _params()}, jnp.asarray(tokens))


def _slots(policy, capacity):
  return kv_cache_lib.init(policy, _CONFIG, 2, capacity)


def _read(kv_cache, gold=None):
  tokens, lengths = _texts()
  if gold is None:
    gold = np.full((*_SHAPE, 2), -1, np.int32)
  zeros = np.zeros_like(lengths)
  return evaluate.read(
      _MODEL, _params(), tokens, zeros, lengths, gold, kv_cache
  )


def _batch(num_new=1):
  tokens, lengths = _texts()
  targets = np.full(_SHAPE, -1, np.int32)
  gold = np.full((*_SHAPE, 2), -1, np.int32)
  for row, end in enumerate(lengths - 1):
    targets[row, end] = 3
    gold[row, end] = (1, 4)
  return tasks.Batch(
      tokens=tokens,
      lengths=lengths,
      num_context=np.array([6, 4], np.int32),
      targets=targets,
      gold=gold,
      num_new=num_new,
  )


class ReadTest(parameterized.TestCase):

  @parameterized.parameters("full_cache", "slots")
  @pytest.mark.slow
  def test_token_by_token_is_what_reading_at_once_gives(self, kind):
    if kind == "slots":
      kv_cache = _slots(full.Full(), _LENGTH)
    else:
      kv_cache = full_cache.init(_CONFIG, 2, _LENGTH)
    tokens, lengths = _texts()
    seen = _read(kv_cache)
    logits = _logits(tokens)
    losses = np.asarray(
        cross_entropy.token_losses(logits[:, :-1], jnp.asarray(tokens[:, 1:]))
    )
    for row, length in enumerate(lengths):
      np.testing.assert_array_equal(
          seen.next_tokens[row, :length], logits[row, :length].argmax(axis=-1)
      )
      np.testing.assert_allclose(
          seen.losses[row, : length - 1],
          losses[row, : length - 1],
          rtol=_TOLERANCE,
      )
      self.assertEqual(np.abs(seen.losses[row, length - 1 :]).sum(), 0)
    self.assertTrue((np.asarray(seen.recall) == -1).all())

  def test_a_window_has_the_last_tokens(self):
    gold = np.full((*_SHAPE, 2), -1, np.int32)
    for time in range(_LENGTH):
      gold[:, time, 0] = max(time - 3, 0)
    gold[0, 9, 1] = 9
    recall = np.asarray(_read(_slots(window.Window(), 3), gold).recall)
    # Three slots, the new token's among them: what is three back has left.
    expected = [1, 1, 1] + [0] * 6 + [0.5]
    np.testing.assert_array_equal(recall[0, :, 0], expected)
    np.testing.assert_array_equal(recall[1, :7, 0], expected[:7])
    self.assertTrue((recall[1, 7:] == -1).all())

  def test_recall_by_hand(self):
    # Two KV heads keep 0, 2 and 2, 5; a layer without positions keeps all.
    pos = jnp.array([[[0, 2, -1], [5, 2, -1]]], jnp.int32)
    caches = (
        types.SimpleNamespace(kept_positions=lambda: pos),
        types.SimpleNamespace(kept_positions=lambda: None),
        types.SimpleNamespace(),
    )
    # A system's state beside a cache hides no slot.
    caches += (layer_hooks.PreparedCache(caches[0], {}),)
    found = evaluate.gold_recall(caches, jnp.array([[2, 0, 7, -1]]))
    # Of 0, 2 and 7 one head has two, the other one; a state has none to lose.
    np.testing.assert_allclose(found, [[0.5, 1.0, -1, 0.5]])
    none = evaluate.gold_recall(caches, jnp.array([[-1]]))
    np.testing.assert_array_equal(none, [[-1, -1, -1, -1]])

  @pytest.mark.slow
  def test_a_compilation_reads_all_texts_of_a_length(self):
    before = evaluate.read._cache_size()
    for _ in range(3):
      _read(_slots(window.Window(), 5))
    self.assertEqual(evaluate.read._cache_size() - before, 1)

  def test_lengths_share_programs(self):
    """What is behind a text takes no part, and no program."""
    (tokens, _), gold = _texts(), np.full((*_SHAPE, 2), -1, np.int32)
    zeros, before = np.zeros(2, np.int32), evaluate.read._cache_size()
    found = []
    for length in (4, 7, 10):
      seen, _ = evaluate.timed_read(
          _MODEL,
          _params(),
          tokens[:, :length],
          zeros,
          np.full(2, length, np.int32),
          gold[:, :length],
          _slots(window.Window(), 4),
      )
      self.assertEqual(np.shape(seen.losses), (2, length))
      found.append(seen)
    self.assertEqual(evaluate.read._cache_size() - before, 1)
    for seen, more in itertools.pairwise(found):
      length = np.shape(seen.losses)[1]
      np.testing.assert_array_equal(
          seen.next_tokens, more.next_tokens[:, :length]
      )
      np.testing.assert_array_equal(seen.losses[:, -1], 0)
      np.testing.assert_array_equal(
          seen.losses[:, :-1], more.losses[:, : length - 1]
      )


class AnswerTest(parameterized.TestCase):

  @pytest.mark.slow
  def test_tokens_are_read_without_compilation(self):
    """JAX_DISABLE_JIT: NumPy arrays reach what is traced in any case."""
    read = lambda: evaluate.answer(
        _MODEL,
        _params(),
        _batch(),
        _slots(full.Full(), _LENGTH + 3),
        reading="tokens",
        num_new=4,
    )
    with jax.disable_jit():
      found = read()
    np.testing.assert_array_equal(found.generated, read().generated)

  def test_all_ways_of_reading_agree_where_all_is_kept(self):
    found = {}
    with jax.debug_nans(True):  # What is not asked is no NaN on a device.
      for reading in ("tokens", "context", "prompt"):
        found[reading] = evaluate.answer(
            _MODEL,
            _params(),
            _batch(),
            _slots(full.Full(), _LENGTH + 3),
            reading=reading,
            num_new=4,
        )
    tokens, lengths = _texts()
    expected = found["tokens"].generated
    logits = _logits(tokens)
    for reading, answers in found.items():
      np.testing.assert_array_equal(answers.generated, expected, reading)
      for row, end in enumerate(lengths - 1):
        first = logits[row, end].argmax()
        self.assertEqual(answers.predicted[row, end], first)
        self.assertEqual(answers.generated[row, 0], first)
        np.testing.assert_array_equal(answers.recall[row, end], [1])
        self.assertTrue(np.isnan(answers.recall[row, :end]).all())
      self.assertEqual((answers.predicted >= 0).sum(), 2)

  @pytest.mark.slow
  def test_a_context_is_compressed_before_it_is_asked(self):
    # Four slots: of six and four tokens of context the last four, then three
    # tokens more each, of which the last asks for positions 1 and 4.
    answers = evaluate.answer(
        _MODEL,
        _params(),
        _batch(),
        _slots(window.Window(), 4),
        reading="context",
    )
    np.testing.assert_array_equal(answers.recall[1, 6], [0.5])
    np.testing.assert_array_equal(answers.recall[0, 9], [0])

  def test_what_cannot_be_read(self):
    tokens, _ = _texts()
    with self.assertRaisesRegex(errors.UserError, "0 to 22"):
      evaluate.check(_MODEL, tokens + 10, 1)
    with self.assertRaisesRegex(errors.UserError, "empty"):
      evaluate.check(_MODEL, tokens[:, :0], 1)
    learned = configs.TransformerConfig(positions="learned", max_len=11)
    with self.assertRaisesRegex(errors.UserError, "11 learned positions"):
      evaluate.check(models.Transformer(learned), tokens, 3)


if __name__ == "__main__":
  absltest.main()
