import dataclasses

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.inference.cache import calls
from joma.inference.cache import kv_cache
from joma.inference.cost import cache_plan
from joma.inference.cost import cost_model
from joma.systems.cache_policies.own_cache import kivi
from joma.transformer import config as configs
from joma.transformer import hooks
from scansnap_jax.experiment import errors
from tests.joma.systems.cache_policies import plain
from tests.joma.systems.cache_policies.own_cache import int4_test

_CONFIG = configs.TransformerConfig(
    vocab_size=5,
    num_layers=1,
    embed_dim=8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    hidden_dim=8,
    max_len=1024,
)
_OPTIONS = hooks.AttentionOptions(scale=0.5, implementation="reference")
_POLICY = kivi.Kivi(num_exact=8, group_size=4)
# The third prompt ends with a block.
_LENGTHS = (5, 19, 16)
# Ten times the largest float32 error seen; values are of order 1.
_TOLERANCE = 2e-5


def _run(policy, arrays, num_steps, capacity):
  (cache,) = kv_cache.init(policy, _CONFIG, 3, capacity)
  lengths, turn = jnp.array(_LENGTHS), lambda x, positions: x
  steps = jnp.arange(max(_LENGTHS))[None]
  positions = jnp.where(steps < lengths[:, None], steps, -1)
  first = [x[:, : max(_LENGTHS)] for x in arrays]
  out, cache = cache.attend(*first, positions, turn, _OPTIONS)

  def step(cache, i):
    at = lengths + i
    pick = lambda x: jnp.take_along_axis(x, at[:, None, None, None], axis=1)
    out, cache = cache.attend(*map(pick, arrays), at[:, None], turn, _OPTIONS)
    return cache, out[:, 0]

  return out, jax.lax.scan(step, cache, jnp.arange(num_steps))


def _oracle(query, key, value, policy):
  """One query [N H] over keys and values [T K H] up to its own."""
  last = (len(key) - 1) // policy.num_exact * policy.num_exact
  out = np.zeros_like(query)
  for head in range(key.shape[1]):
    keys, values = key[:, head].copy(), value[:, head].copy()
    if last:
      keys[:last] = int4_test.plain(keys[:last], "tokens", policy.group_size)[1]
      values[:last] = int4_test.plain(values[:last], "channels", 4)[1]
    groups = len(query) // key.shape[1]
    for n in range(head * groups, (head + 1) * groups):
      weights = plain.softmax(np.float64(_OPTIONS.scale * keys @ query[n]))
      out[n] = weights @ values
  return out


class KiviTest(parameterized.TestCase):

  def test_is_plain_python_at_every_step(self):
    self._check(12)

  @pytest.mark.slow
  def test_over_512_steps(self):
    self._check(512)

  def _check(self, num_steps):
    draws = np.random.default_rng(0)
    length = max(_LENGTHS) + num_steps
    query, key, value = (
        draws.standard_normal((3, length, heads, 8), np.float32)
        for heads in (4, 2, 2)
    )
    key += 3 * draws.standard_normal(8, np.float32)
    run = jax.jit(_run, static_argnums=(0, 2, 3))
    arrays = jax.device_put((query, key, value))
    _, (_, outs) = run(_POLICY, arrays, num_steps, length + 3)
    # The last one as well: of 512 steps each 37th.
    steps = sorted(
        {*range(0, num_steps, max(1, num_steps // 14)), num_steps - 1}
    )
    for b, start in enumerate(_LENGTHS):
      for i in steps:
        stop = start + i + 1
        want = _oracle(
            query[b, stop - 1], key[b, :stop], value[b, :stop], _POLICY
        )
        np.testing.assert_allclose(outs[i, b], want, atol=_TOLERANCE)

  @parameterized.product(capacity=(256, 300), dtype=("float32", "bfloat16"))
  def test_bytes_are_those_of_the_cost_model(self, capacity, dtype):
    """Of the default sizes and heads of 64, to the byte."""
    config = dataclasses.replace(_CONFIG, head_dim=64, num_layers=2)
    policy = kivi.Kivi()
    caches = jax.eval_shape(
        lambda: kv_cache.init(policy, config, 3, capacity, jnp.dtype(dtype))
    )
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(caches))
    load = cost_model.Load(batch_size=3, length=capacity, cache_dtype=dtype)
    plan = calls.plan(policy, (capacity,) * 2, "x")
    self.assertEqual(cost_model.cache_bytes(config, load, plan), held)

  def test_bytes_by_hand(self):
    """A block of 128 tokens, H = 64, bfloat16: codes, scales and one block."""
    coding = cache_plan.Coding(128, 32)
    codes, scales, exact = (
        128 * 64,
        2 * 2 * (4 * 64 + 128 * 2),
        2 * 128 * 64 * 2,
    )
    self.assertEqual(coding.bytes_of(200, 64, 2), codes + scales + exact)
    # Five bits a number, 3.2 times less than bfloat16.
    self.assertEqual(8 * (codes + scales) / (2 * 128 * 64), 5)

  @parameterized.parameters(
      (dict(num_exact=10, group_size=4), "num_exact=10 must be a multiple"),
      (dict(group_size=0), "group_size must be at least 1, got 0"),
  )
  def test_out_of_range_is_named(self, fields, message):
    with self.assertRaisesRegex(errors.UserError, message):
      kivi.Kivi(**fields)

  def test_what_it_cannot_hold_is_named(self):
    with self.assertRaisesRegex(errors.UserError, "dtype=int8 of a kivi"):
      kv_cache.init(_POLICY, _CONFIG, 1, 8, jnp.int8)
    with self.assertRaisesRegex(errors.UserError, "kivi keeps rotated keys"):
      kv_cache.init(_POLICY, _CONFIG, 1, 8, positions="rolled")


if __name__ == "__main__":
  absltest.main()
