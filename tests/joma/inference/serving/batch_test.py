"""Rows of a batch: what a sequence gets is what it would get alone."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np
import pytest

from joma.inference import generate
from joma.inference import sampling_config
from joma.inference.cache import kv_cache
from joma.inference.serving import batch as batches
from joma.inference.serving import queue
from joma.inference.serving import rows as row_lib
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
_HOT = sampling_config.SamplingConfig(temperature=1.0, seed=1)
# Ragged, and more than there are rows.
_REQUESTS = [
    queue.Request(prompt, max_new_tokens)
    for prompt, max_new_tokens in (
        ([3, 1, 4, 1, 5], 9),
        ([9], 14),
        ([2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2], 3),
        ([3, 8, 4], 1),
        ([6, 2, 6, 4, 3, 3, 8, 3, 2], 11),
        ([7, 9], 6),
    )
]


@functools.cache
def _params():
  return jax.tree.map(lambda x: 3 * x, applied.params(_MODEL, 1))


def _make(name):
  """What makes caches of eight slots, or of all that there is."""
  policy = names.parse(policies_test._SIZED.get(name, name))
  capacity = 8 if policy.evicts and not policy.reads_part else 32
  return functools.partial(kv_cache.init, policy, _CONFIG, capacity=capacity)


def _full(batch_size):
  return full_cache.init(_CONFIG, batch_size, 32)


def _batch(make, num_rows=2, **options):
  return batches.Batch(_MODEL, _params(), make, num_rows, **options)


def _served(batch, requests):
  """Tokens of each request, and what its row kept when it ended."""
  tokens, kept, row_of = {}, {}, {}
  join = batch.join

  def joined(*request):
    new = join(*request)
    row_of[len(row_of)] = new.row
    return new

  batch.join = joined
  for number, token in queue.serve(batch, requests):
    tokens.setdefault(number, []).append(token)
    if len(tokens[number]) == requests[number].max_new_tokens:
      kept[number] = _kept(batch.kv_cache, row_of[number])
  return tokens, kept


def _kept(caches, row):
  """Positions of a row's heads, in order; None where nothing leaves."""
  found = [
      cache.kept_positions() if hasattr(cache, "kept_positions") else None
      for cache in caches
  ]
  return [None if x is None else np.sort(np.asarray(x)[row]) for x in found]


def _alone(make, request, **options):
  steps = generate.stream(
      _MODEL,
      _params(),
      [request.prompt],
      max_new_tokens=request.max_new_tokens,
      kv_cache=make(batch_size=1),
      **options,
  )
  tokens = [int(tokens[0]) for tokens, _ in steps]
  return tokens, _kept(steps.last.kv_cache, 0)


class BatchTest(parameterized.TestCase):

  def test_neighbours_change_nothing(self):
    self._check("h2o", _REQUESTS[:3], sampler=_HOT)

  @parameterized.parameters(*names.POLICIES, *names.WRAPPERS)
  @pytest.mark.slow
  def test_every_policy_decodes_row_by_row(self, name):
    self._check(name, _REQUESTS)

  @pytest.mark.slow
  def test_draws_are_those_of_the_sequence_alone(self):
    self._check("streaming_llm", _REQUESTS, sampler=_HOT)

  def _check(self, name, requests, **options):
    make = _make(name)
    tokens, kept = _served(_batch(make, **options), requests)
    for number, request in enumerate(requests):
      want, want_kept = _alone(make, request, **options)
      self.assertEqual(tokens[number], want, number)
      np.testing.assert_equal(kept[number], want_kept)

  @pytest.mark.slow
  def test_a_cache_that_keeps_everything_and_ends_of_texts(self):
    eos_ids = (_alone(_full, _REQUESTS[0])[0][3],)
    batch = _batch(_full, 3, eos_ids=eos_ids)
    tokens = {}
    for number, token in queue.serve(batch, _REQUESTS):
      tokens.setdefault(number, []).append(token)
    for number, request in enumerate(_REQUESTS):
      want, _ = _alone(_full, request, eos_ids=eos_ids)
      self.assertEqual(tokens[number], want)
    self.assertLess(len(tokens[0]), _REQUESTS[0].max_new_tokens)
    self.assertTrue(batch.is_idle)

  @pytest.mark.slow
  def test_one_program_serves_all_who_come_and_go(self):
    jax.clear_caches()
    batch = _batch(_make("h2o"), 2)
    list(queue.serve(batch, _REQUESTS))
    list(queue.serve(batch, _REQUESTS[::-1]))
    self.assertEqual(row_lib.step._cache_size(), 1)
    self.assertEqual(row_lib.join._cache_size(), 1)

  @pytest.mark.slow
  def test_the_batch_stays_full_while_somebody_waits(self):
    """Two rows: as few steps as the tokens, taken in order, allow."""
    batch = _batch(_full, 2)
    list(queue.serve(batch, _REQUESTS))
    busy, steps = [0, 0], 0
    for request in _REQUESTS:
      row = busy.index(min(busy))
      busy[row] += request.max_new_tokens - 1
    steps = max(busy)
    self.assertEqual(batch.num_steps, steps)

  @parameterized.parameters("full", "h2o", "keydiff", "adakv")
  @pytest.mark.slow
  def test_a_prefix_is_copied_and_not_read_again(self, name):
    """As a conversation whose first turn it was, any number of times."""
    make = _full if name == "full" else _make(name)
    batch, prefix = _batch(make), [5, 3, 1, 4, 1, 5, 9, 2, 6]
    read = batch.read(prefix)
    requests = [
        queue.Request(r.prompt, r.max_new_tokens, read) for r in _REQUESTS
    ]
    tokens, kept = _served(batch, requests)
    for number, request in enumerate(_REQUESTS):
      steps = generate.stream(
          _MODEL,
          _params(),
          [prefix],
          max_new_tokens=1,
          kv_cache=make(batch_size=1),
      )
      next(steps)
      steps = generate.stream(
          _MODEL,
          _params(),
          [request.prompt],
          max_new_tokens=request.max_new_tokens,
          kv_cache=steps.last.kv_cache,
          starts=[len(prefix)],
      )
      want = [int(token[0]) for token, _ in steps]
      self.assertEqual(tokens[number], want)
      np.testing.assert_equal(kept[number], _kept(steps.last.kv_cache, 0))
      if name == "full":
        whole = queue.Request(
            [*prefix, *request.prompt], request.max_new_tokens
        )
        self.assertEqual(tokens[number], _alone(make, whole)[0])

  @pytest.mark.slow
  def test_who_leaves_makes_room(self):
    batch = _batch(_full, 1)
    batch.join([1, 2], 9)
    batch.step()
    with self.assertRaisesRegex(errors.UserError, "all 1 rows are taken: wait"):
      batch.join([3], 2)
    batch.leave(0)
    with self.assertRaisesRegex(
        errors.UserError, "row=0: no sequence is there"
    ):
      batch.leave(0)
    tokens = [batch.join(*_REQUESTS[0][:2]).token]
    while not batch.is_idle:
      tokens += [new.token for new in batch.step()]
    self.assertEqual(tokens, _alone(_full, _REQUESTS[0])[0])
    self.assertEmpty(batch.step())

  @pytest.mark.slow
  def test_who_has_left_stays_away_while_others_go_on(self):
    batch = _batch(_full, 2)
    batch.join([1, 2], 9)
    batch.join(*_REQUESTS[0][:2])
    batch.leave(0)
    for _ in range(2):
      self.assertEqual([new.row for new in batch.step()], [1])
      self.assertEqual(batch.num_free, 1)

  def test_bad_input_is_one_sentence(self):
    batch = batches.Batch(_MODEL, None, _full, 2)
    for arguments, message in (
        (([], 3), "Prompt 0 has no tokens"),
        (([50], 3), "token ids from 50 to 50; the model knows 0 to 49"),
        (([1], 0), "max_new_tokens must be at least 1, got 0"),
        (([1] * 30, 4), "holds 32 positions and nothing leaves it; .* take 33"),
    ):
      with self.assertRaisesRegex(errors.UserError, message):
        batch.join(*arguments)
    with self.assertRaisesRegex(
        errors.UserError, "num_rows must be at least 1"
    ):
      batches.Batch(_MODEL, None, _full, 0)
    with self.assertRaisesRegex(
        errors.UserError, "has more than a row for each"
    ):
      shared = lambda batch_size: tuple(np.zeros((5, 2)) for _ in range(2))
      batches.Batch(_MODEL, None, shared, 2)

  def test_what_all_prompts_begin_with(self):
    self.assertEqual(queue.shared_length([[1, 2, 3], [1, 2, 4, 5]]), 2)
    self.assertEqual(queue.shared_length([[1, 2], [1, 2, 3]]), 1)
    self.assertEqual(queue.shared_length([[1], [2]]), 0)
    self.assertEqual(queue.shared_length([[7]]), 0)


if __name__ == "__main__":
  absltest.main()
