import functools

from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np

from joma.inference.cache import kv_cache
from joma.systems.cache_policies.by_attention import h2o
from joma.systems.cache_policies.by_attention import h2o_variants
from joma.transformer import hooks

_HEADS, _PROMPT, _STEPS, _SIZE = 4, 64, 128, 16
_BUDGET = (8, 8)
_OPTIONS = hooks.AttentionOptions(scale=_SIZE**-0.5, implementation="reference")


@functools.cache
def _text():
  """Query and key [T N H]: a sink, and saliences that follow a power law."""
  rng = np.random.default_rng(0)
  length = _PROMPT + _STEPS
  query = rng.normal(size=(length, _HEADS, _SIZE))
  key = rng.normal(size=(length, _HEADS, _SIZE))
  shared = rng.normal(size=(_HEADS, _SIZE))
  salience = rng.pareto(1.5, size=(length, _HEADS))
  salience[0] = salience.max()
  query = query + shared
  key = key + np.minimum(salience, 3)[..., None] * shared / 2
  return query.astype(np.float32), key.astype(np.float32)


def _logits():
  query, key = (x.astype(np.float64) for x in _text())
  return np.einsum("TNH,SNH->NTS", query, key) * _OPTIONS.scale


def _seen():
  logits = _logits()
  return {
      "real_drop": h2o_variants.real_drop(logits, _PROMPT, *_BUDGET),
      "hf_mask": h2o_variants.hf_mask(logits, _PROMPT, *_BUDGET),
      "lmeval_llama": h2o_variants.lmeval_llama(logits, _PROMPT, *_BUDGET),
      "lmeval_opt": h2o_variants.lmeval_opt(logits, _PROMPT, *_BUDGET),
      "flexgen": h2o_variants.flexgen(logits, _PROMPT, _BUDGET[0]),
  }


def _num_resurrections(seen):
  """Keys that are seen, then not, then again."""
  gone = ~seen[:, :-1] & (np.cumsum(seen, axis=1)[:, :-1] > 0)
  return int((gone & seen[:, 1:]).sum())


class VariantsTest(absltest.TestCase):

  def test_the_slot_cache_is_the_paper_s_algorithm(self):
    query, key = _text()
    num_slots = sum(_BUDGET) + 1
    cache = kv_cache.init_layer(
        h2o.H2O(num_recent=_BUDGET[1]).with_capacity(num_slots),
        0,
        (1, _HEADS, num_slots, _SIZE),
        1,
        jnp.float32,
    )
    plain = lambda x, positions: x
    first = lambda x: jnp.asarray(x[None, :_PROMPT])
    positions = jnp.arange(_PROMPT)[None]
    _, cache = cache.attend(
        first(query), first(key), first(key), positions, plain, _OPTIONS
    )

    def step(cache, at):
      pick = lambda x: jnp.asarray(x)[None, at][:, None]
      _, cache = cache.attend(
          pick(query),
          pick(key),
          pick(key),
          at[None, None],
          plain,
          _OPTIONS,
      )
      return cache, cache.pos[0]

    # The prompt leaves one slot more than the paper's budget: it goes first.
    steps = jnp.arange(_PROMPT, _PROMPT + _STEPS)
    _, kept = jax.lax.scan(step, cache, steps)
    want = h2o_variants.real_drop(_logits(), _PROMPT, *_BUDGET)
    for t in range(_STEPS):
      for head in range(_HEADS):
        found = np.sort(kept[t, head])
        np.testing.assert_array_equal(found, np.flatnonzero(want[head, t]))

  def test_the_five_see_different_keys(self):
    seen = _seen()
    count = {name: rows.sum(-1).mean() for name, rows in seen.items()}
    self.assertEqual(count["real_drop"], 17)
    self.assertEqual(count["hf_mask"], 16)
    self.assertEqual(count["flexgen"], 16)
    names = list(seen)
    for i, one in enumerate(names):
      for other in names[i + 1 :]:
        both = (seen[one] & seen[other]).sum()
        either = (seen[one] | seen[other]).sum()
        self.assertLess(both / either, 0.99, (one, other))

  def test_only_masks_bring_keys_back(self):
    resurrections = {k: _num_resurrections(v) for k, v in _seen().items()}
    self.assertEqual(resurrections["real_drop"], 0)
    self.assertEqual(resurrections["flexgen"], 0)
    self.assertGreater(resurrections["hf_mask"], 0)

  def test_only_the_harness_s_llama_script_sees_the_future(self):
    before, logits = _seen(), _logits()
    half = _PROMPT + _STEPS // 2
    logits[:, half:] = np.random.default_rng(1).normal(
        size=logits[:, half:].shape
    )
    past = slice(0, _STEPS // 2)
    after = {
        "real_drop": h2o_variants.real_drop(logits, _PROMPT, *_BUDGET),
        "hf_mask": h2o_variants.hf_mask(logits, _PROMPT, *_BUDGET),
        "lmeval_opt": h2o_variants.lmeval_opt(logits, _PROMPT, *_BUDGET),
        "flexgen": h2o_variants.flexgen(logits, _PROMPT, _BUDGET[0]),
    }
    for name, rows in after.items():
      np.testing.assert_array_equal(rows[:, past], before[name][:, past])
    rows = h2o_variants.lmeval_llama(logits, _PROMPT, *_BUDGET)
    changed = rows[:, past] != before["lmeval_llama"][:, past]
    self.assertTrue(changed.any())

  def test_a_pool_that_forgets_keeps_less_of_the_attention(self):
    logits = _logits()[:, _PROMPT:]
    causal = np.tril(np.ones(logits.shape[1:], bool), _PROMPT)
    weights = np.where(causal, np.exp(logits), 0)
    weights /= weights.sum(-1, keepdims=True)
    mass = {k: (weights * v).sum(-1).mean() for k, v in _seen().items()}
    self.assertGreater(mass["real_drop"], mass["lmeval_opt"])
    self.assertGreater(mass["lmeval_llama"], mass["lmeval_opt"])
