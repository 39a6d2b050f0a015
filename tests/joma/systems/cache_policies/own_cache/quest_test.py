from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.inference.cache import kv_cache
from joma.systems.cache_policies.own_cache import quest
from joma.transformer import config as configs
from joma.transformer import hooks
from scansnap_jax.experiment import errors

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
_LENGTHS = jnp.array([5, 18])
# Ten times the largest float32 error seen; values are of order 1.
_TOLERANCE = 2e-5


def _plain(x, positions):
  return x


def _run(policy, arrays, num_steps=20):
  (cache,) = kv_cache.init(policy, _CONFIG, 2, 40)
  steps = jnp.arange(18)[None]
  positions = jnp.where(steps < _LENGTHS[:, None], steps, -1)
  first = lambda x: x[:, :18]
  _, cache = cache.attend(*map(first, arrays), positions, _plain, _OPTIONS)

  def step(cache, i):
    at = _LENGTHS + i
    pick = lambda x: jnp.take_along_axis(x, at[:, None, None, None], axis=1)
    out, cache = cache.attend(*map(pick, arrays), at[:, None], _plain, _OPTIONS)
    return cache, out[:, 0]

  return jax.lax.scan(step, cache, jnp.arange(num_steps))[1]


def _oracle(query, key, value, num_pages, size):
  """One query [N H] over all keys up to its own, [T K H], page by page."""
  out = np.zeros_like(query)
  for head in range(2):
    mine = query[2 * head : 2 * head + 2]
    starts = range(0, len(key), size)
    bounds = []
    for start in starts:
      page = key[start : start + size, head]
      best = [
          sum(max(q * page[:, d].min(), q * page[:, d].max()) for d, q in row)
          for row in (list(enumerate(g)) for g in mine)
      ]
      bounds.append(max(best))
    bounds[-1] = np.inf
    chosen = np.argsort(bounds)[::-1][:num_pages]
    index = [t for t in range(len(key)) if t // size in chosen]
    for g in range(2):
      logits = 0.5 * key[index, head] @ mine[g]
      weights = np.exp(logits - logits.max())
      out[2 * head + g] = weights @ value[index, head] / weights.sum()
  return out


class QuestTest(parameterized.TestCase):

  @parameterized.parameters((8, 4), (4, 4), (9, 3), (64, 4))
  @pytest.mark.by_default(0)
  def test_reads_the_pages_of_the_greatest_bounds(self, num_keys, page_size):
    draws = jax.random.split(jax.random.key(0), 3)
    arrays = [
        jax.random.normal(draw, (2, 40, heads, 4))
        for draw, heads in zip(draws, (4, 2, 2), strict=True)
    ]
    policy = quest.Quest(num_keys=num_keys, page_size=page_size)
    outs = jax.jit(lambda a: _run(policy, a))(arrays)
    query, key, value = (np.asarray(x, np.float64) for x in arrays)
    for b, length in enumerate(np.asarray(_LENGTHS)):
      for i in range(20):
        at = length + i
        want = _oracle(
            query[b, at],
            key[b, : at + 1],
            value[b, : at + 1],
            num_keys // page_size,
            page_size,
        )
        np.testing.assert_allclose(outs[i, b], want, atol=_TOLERANCE)

  def test_sizes_that_do_not_fit_are_named(self):
    with self.assertRaisesRegex(errors.UserError, "num_keys=10.*page_size=4"):
      quest.Quest(num_keys=10, page_size=4)
    with self.assertRaisesRegex(errors.UserError, "num_keys=2"):
      quest.Quest(num_keys=2, page_size=4)
    with self.assertRaisesRegex(errors.UserError, "absolute positions"):
      kv_cache.init(quest.Quest(), _CONFIG, 2, 16, positions="rolled")
