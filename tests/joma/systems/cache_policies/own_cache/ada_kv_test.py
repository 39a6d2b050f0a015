import dataclasses
import functools

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.inference.cache import kv_cache
from joma.systems.cache_policies.by_attention import h2o
from joma.systems.cache_policies.by_attention import tova
from joma.systems.cache_policies.by_place import full
from joma.systems.cache_policies.by_place import window
from joma.systems.cache_policies.own_cache import ada_kv
from joma.systems.cache_policies.own_cache import duo_attention
from joma.transformer import config as configs
from joma.transformer import hooks
from scansnap_jax.experiment import errors
from tests.joma.systems.cache_policies.by_attention import h2o_test

_CAPACITY, _LENGTHS, _STEPS = 6, (4, 15, 9), 25
_CONFIG = configs.TransformerConfig(
    vocab_size=5,
    num_layers=1,
    embed_dim=8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    hidden_dim=8,
    max_len=64,
)
_OPTIONS = hooks.AttentionOptions(scale=0.5, implementation="reference")
# Ten times the largest float32 error seen; values are of order 1.
_TOLERANCE = 2e-5


def _plain(x, positions):
  return x


def _draw():
  """The heads differ in how sharply they look."""
  keys = jax.random.split(jax.random.key(0), 3)
  shape = lambda heads: (3, max(_LENGTHS) + _STEPS, heads, 4)
  sharpness = jnp.array([4.0, 4.0, 0.2, 0.2])[:, None]
  query = jax.random.normal(keys[0], shape(4)) * sharpness[None, None]
  key = jax.random.normal(keys[1], shape(2))
  return query, key, jax.random.normal(keys[2], shape(2))


@functools.partial(jax.jit, static_argnames=("policy",))
def _run(policy, query, key, value):
  (cache,) = kv_cache.init(policy, _CONFIG, 3, _CAPACITY)
  longest, lengths = max(_LENGTHS), jnp.array(_LENGTHS)
  steps = jnp.arange(longest)[None]
  positions = jnp.where(steps < lengths[:, None], steps, -1)
  first = lambda x: x[:, :longest]
  out, cache = cache.attend(
      first(query), first(key), first(value), positions, _plain, _OPTIONS
  )

  def step(cache, i):
    at = lengths + i
    pick = lambda x: jnp.take_along_axis(x, at[:, None, None, None], axis=1)
    out, cache = cache.attend(
        pick(query), pick(key), pick(value), at[:, None], _plain, _OPTIONS
    )
    return cache, (out[:, 0], cache.pool.pos, cache.owner)

  return out, cache, jax.lax.scan(step, cache, jnp.arange(_STEPS))[1]


class AdaKVTest(absltest.TestCase):

  def test_is_plain_python_with_what_all_heads_share_out(self):
    base = h2o.H2O(num_recent=1)
    policy = ada_kv.AdaKV(base=base, floor=0.5)
    arrays = _draw()
    _, start, (outs, places, owners) = _run(policy, *arrays)
    query, key, value = (np.asarray(x, np.float64) for x in arrays)
    unequal = 0
    for b, length in enumerate(_LENGTHS):
      parts = [x[b, :length] for x in (query, key, value)]
      whole = h2o_test.Plain(base, 64, 2, _OPTIONS.scale)
      whole.policy = base.with_capacity(_CAPACITY)
      whole.read(*parts)
      shares = _shares(whole, length)
      budgets = [len(share) for share in shares]
      if length > _CAPACITY:
        self.assertEqual(sum(budgets), 2 * _CAPACITY)
        np.testing.assert_array_equal(start.budgets[b], budgets)
        unequal += budgets[0] != budgets[1]
      else:
        np.testing.assert_array_equal(start.budgets[b], [_CAPACITY] * 2)
        budgets = [_CAPACITY] * 2
      for head in range(2):
        oracle = h2o_test.Plain(base, budgets[head], 2, _OPTIONS.scale)
        oracle.policy = whole.policy
        # The other head only fills in: it is judged in its own turn.
        for h in range(2):
          kept = [s for s in whole.slots[h] if s and s["pos"] in shares[h]]
          kept = [dict(s) for s in kept][: budgets[head]]
          oracle.slots[h] = kept + [None] * (budgets[head] - len(kept))
        for i in range(_STEPS):
          at = length + i
          want = oracle.step(query[b, at], key[b, at], value[b, at], at)
          mine = np.asarray(owners[i, b]) == head
          pos = np.asarray(places[i, b, 0])[mine]
          self.assertEqual(sorted(pos[pos >= 0]), oracle.visible(head))
          np.testing.assert_allclose(
              outs[i, b, 2 * head : 2 * head + 2],
              want[2 * head : 2 * head + 2],
              atol=_TOLERANCE,
          )
    self.assertGreater(unequal, 0)  # Or the budgets were never at work.

  @pytest.mark.slow
  def test_takes_the_memory_of_the_average_and_less_than_a_page_a_head(self):
    config = dataclasses.replace(_CONFIG, max_len=4096)
    size = lambda policy, capacity: sum(
        x.nbytes
        for x in jax.tree.leaves(kv_cache.init(policy, config, 3, capacity))
    )
    base, budgets = h2o.H2O(), 3 * 2 * 4
    for capacity in (16, 22, 2048):
      page = 128 if capacity == 2048 else 16
      # The most pages that two budgets of that mean can take, as slots a head.
      most = max(
          -(-first // page) - (first - 2 * capacity) // page
          for first in range(1, 2 * capacity)
      )
      self.assertEqual(
          size(ada_kv.AdaKV(base=base), capacity) - budgets,
          size(base, most * page // 2),
      )

  def test_what_it_cannot_wrap_is_refused(self):
    with self.assertRaisesRegex(errors.UserError, "tova has no priority"):
      ada_kv.AdaKV(base=tova.TOVA())
    with self.assertRaisesRegex(errors.UserError, "floor=1.5"):
      ada_kv.AdaKV(base=h2o.H2O(), floor=1.5)
    with self.assertRaisesRegex(errors.UserError, "rotated keys"):
      policy = ada_kv.AdaKV(base=h2o.H2O())
      kv_cache.init(policy, _CONFIG, 2, 8, positions="rolled")


def _shares(oracle, length):
  """Which positions stay: 3 of each head at least, then the best of all."""
  ranked = []
  for head in oracle.heads:
    tokens = [s for s in oracle.slots[head] if s is not None]
    ranks = oracle.ranks(tokens, length, head)
    ranked.append(sorted(zip(ranks, range(length), strict=True))[::-1])
  shares = [{t for _, t in mine[:3]} for mine in ranked]
  rest = [
      (rank, head, t)
      for head, mine in enumerate(ranked)
      for rank, t in mine[3:]
  ]
  room = 2 * _CAPACITY - sum(map(len, shares))
  for _, head, t in sorted(rest)[::-1][:room]:
    shares[head].add(t)
  return shares


class DuoAttentionTest(parameterized.TestCase):

  @parameterized.parameters(((0,),), ((1,),), ((),), ((0, 1),))
  @pytest.mark.by_default(0)
  def test_each_head_is_as_in_a_cache_of_its_own_kind(self, retrieval):
    config = dict(num_sinks=1, window_capacity=5)
    policy = duo_attention.DuoAttention(retrieval_heads=(retrieval,), **config)
    arrays = _draw()
    caches = kv_cache.init(policy, _CONFIG, 3, 64)
    self.assertLen(caches[0].heads, 2 - (len(retrieval) != 1))
    out = _steps(caches[0], arrays)
    for head in range(2):
      kind = full.Full() if head in retrieval else None
      kind = kind or window.StreamingLLM(num_sinks=1)
      capacity = 64 if head in retrieval else 5
      (alone,) = kv_cache.init(kind, _CONFIG, 3, capacity)
      mine = slice(2 * head, 2 * head + 2)
      want = _steps(alone, arrays)[:, :, mine]
      np.testing.assert_allclose(out[:, :, mine], want, atol=_TOLERANCE)

  def test_heads_that_are_not_there_are_named(self):
    with self.assertRaisesRegex(errors.UserError, r"\(3,\) of layer 0"):
      policy = duo_attention.DuoAttention(retrieval_heads=((3,),))
      kv_cache.init(policy, _CONFIG, 2, 16)
    with self.assertRaisesRegex(errors.UserError, "of 0 layers"):
      kv_cache.init(duo_attention.DuoAttention(), _CONFIG, 2, 16)


@jax.jit
def _steps(cache, arrays):
  def step(cache, i):
    pick = lambda x: jax.lax.dynamic_slice_in_dim(x, i, 1, axis=1)
    at = jnp.full((3, 1), i)
    out, cache = cache.attend(*map(pick, arrays), at, _plain, _OPTIONS)
    return cache, out[:, 0]

  return jax.lax.scan(step, cache, jnp.arange(20))[1]
