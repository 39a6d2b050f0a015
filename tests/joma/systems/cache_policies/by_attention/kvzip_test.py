from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.inference.cache import calls
from joma.inference.cache import kv_cache
from joma.inference.cache import rehearsal
from joma.systems.cache_policies import names
from joma.systems.cache_policies.by_attention import kvzip
from joma.systems.cache_policies.wrapping import dms
from joma.systems.cache_policies.wrapping import layer_budgets
from joma.transformer import hooks
from tests.joma.systems.cache_policies import plain


class Plain(plain.Plain):
  """The greatest weight from any query so far."""

  def score_prompt(self, tokens, seen):
    for t, token in enumerate(tokens):
      token["score"] = seen.weights[:, :, t].max()

  def observe(self, kept, rows, position):
    for i, token in enumerate(kept):
      given = max(weights[i] for _, weights in rows)
      token["score"] = max(token["score"], given)


class KVzipTest(parameterized.TestCase):

  def test_keeps_what_plain_python_keeps_at_every_step(self):
    plain.check(Plain, kvzip.KVzip())

  @parameterized.parameters((4, 1), (4, 2), (3, 3))
  @pytest.mark.slow
  def test_over_512_steps_grouped_or_not(self, *heads):
    plain.check(Plain, kvzip.KVzip(), *heads, num_steps=512)


class RehearsalTest(parameterized.TestCase):

  def test_texts_are_followed_by_a_request_and_themselves(self):
    rows = jnp.array([[1, 2, 3, 4], [5, 6, 0, 0]])
    found, lengths = rehearsal.repeat(rows, jnp.array([4, 2]), (8, 9))
    self.assertEqual(found[0].tolist(), [1, 2, 3, 4, 8, 9, 1, 2, 3, 4])
    self.assertEqual(found[1, :6].tolist(), [5, 6, 8, 9, 5, 6])
    self.assertEqual(lengths.tolist(), [10, 6])

  @parameterized.parameters(
      lambda base: base,
      # Whose own changes are none.
      lambda base: dms.DMS(base=base, threshold=0.0),
      lambda base: layer_budgets.LayerBudgets(base=base, ratio=1.0),
      lambda base: dms.DMS(base=dms.DMS(base=base)),
  )
  def test_what_the_repetition_looks_at_stays(self, wrapped):
    """By a loop over rows, for two texts of different lengths."""
    draws = np.random.default_rng(0)
    starts, kept = (9, 6), 4
    lengths = [2 * start + 2 for start in starts]
    size, groups = max(lengths), 2
    normal = lambda heads: draws.standard_normal(
        (2, size, heads, 8), np.float32
    )
    query, key, value = 2 * normal(4), normal(2), normal(2)
    steps = np.arange(size)
    positions = np.where(steps < np.array(lengths)[:, None], steps, -1)
    policy = wrapped(kvzip.KVzip()).with_capacity(kept)
    empty = kv_cache.init_layer(policy, 0, (2, 2, kept, 8), groups, jnp.float32)
    (cache,) = rehearsal.prepare((empty,), jnp.array(starts))
    self.assertTrue(rehearsal.are_rehearsing((cache,)))
    options = hooks.AttentionOptions(scale=0.4, implementation="reference")
    turn = lambda x, positions: x
    arguments = (query, key, value, positions.astype(np.int32), turn, options)
    out, cache = cache.attend(*map(_on_device, arguments))
    for b, (start, length) in enumerate(zip(starts, lengths, strict=True)):
      best = np.zeros((2, start))
      for n in range(4):
        for t in range(length):
          logits = 0.4 * key[b, : t + 1, n // groups] @ query[b, t, n]
          weights = plain.softmax(np.asarray(logits, np.float64))
          expected = weights @ value[b, : t + 1, n // groups]
          np.testing.assert_allclose(out[b, t, n], expected, atol=2e-5)
          if t >= start:
            head = n // groups
            best[head] = np.maximum(best[head], weights[:start])
      for head in range(2):
        expected = np.sort(np.argsort(-best[head])[:kept])
        np.testing.assert_array_equal(cache.pos[b, head], expected)
        np.testing.assert_allclose(
            cache.score[b, head], best[head][expected], rtol=1e-5
        )

  @parameterized.parameters("h2o", "dms:h2o", "two_stage:snapkv+kvzip")
  def test_other_policies_read_once(self, name):
    self.assertIsNone(calls.request(names.parse(name)))

  @parameterized.parameters("kvzip", "dms:kvzip", "criticalkv:kvzip")
  def test_what_wraps_it_asks_for_what_it_asks(self, name):
    self.assertEqual(calls.request(names.parse(name)), kvzip.KVzip().request)


def _on_device(x):
  return jax.device_put(x) if isinstance(x, np.ndarray) else x


if __name__ == "__main__":
  absltest.main()
