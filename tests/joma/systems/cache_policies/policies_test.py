import functools

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.inference.cache import kv_cache
from joma.systems.cache_policies import names as policy_names
from joma.systems.cache_policies.by_attention import h2o
from joma.systems.cache_policies.by_attention import snapkv
from joma.transformer import attention
from scansnap_jax.experiment import errors
from tests.joma.systems.cache_policies import policy_oracle

_CAPACITY, _HEAD_DIM = 12, 8
_LENGTHS = (5, 23, 30)
# Ten times the largest float32 error seen; values are of order 1.
_TOLERANCE = 2e-5
_OPTIONS = attention.AttentionOptions(
    scale=_HEAD_DIM**-0.5, implementation="reference"
)


def _plain(x, positions):
  return x


def _draw(num_heads, num_kv_heads, num_steps):
  """Keys share a direction, so that cosines are not all nought."""
  keys = jax.random.split(jax.random.key(num_heads), 4)
  shape = lambda heads: (3, num_steps, heads, _HEAD_DIM)
  query = 2 * jax.random.normal(keys[0], shape(num_heads))
  key = jax.random.normal(keys[1], shape(num_kv_heads))
  key = key + jax.random.normal(keys[2], (num_kv_heads, _HEAD_DIM))[None, None]
  return query, key, jax.random.normal(keys[3], shape(num_kv_heads))


@functools.partial(jax.jit, static_argnames=("policy", "num_heads"))
def _run(policy, num_heads, query, key, value):
  """Prompts of different lengths, then a token a step for each."""
  cache = kv_cache.init_layer(
      policy.with_capacity(_CAPACITY),
      0,
      (3, key.shape[2], _CAPACITY, _HEAD_DIM),
      num_heads // key.shape[2],
      jnp.float32,
  )
  longest, lengths = max(_LENGTHS), jnp.array(_LENGTHS)
  steps = jnp.arange(longest)[None]
  prompt_positions = jnp.where(steps < lengths[:, None], steps, -1)
  first = lambda x: x[:, :longest]
  _, cache = cache.attend(
      first(query), first(key), first(value), prompt_positions, _plain, _OPTIONS
  )

  def step(cache, i):
    at = lengths + i
    pick = lambda x: jnp.take_along_axis(x, at[:, None, None, None], axis=1)
    out, cache = cache.attend(
        pick(query), pick(key), pick(value), at[:, None], _plain, _OPTIONS
    )
    return cache, (out[:, 0], cache.pos)

  start = cache.pos
  num_steps = query.shape[1] - longest
  _, (outs, kept) = jax.lax.scan(step, cache, jnp.arange(num_steps))
  return start, outs, kept


def _check(name, num_heads, num_kv_heads, num_steps):
  policy = policy_oracle.every_policy()[name]
  arrays = _draw(num_heads, num_kv_heads, num_steps + max(_LENGTHS))
  start, outs, kept = map(np.asarray, _run(policy, num_heads, *arrays))
  query, key, value = (np.asarray(x, np.float64) for x in arrays)
  for b, length in enumerate(_LENGTHS):
    oracle = policy_oracle.Oracle(
        policy, _CAPACITY, num_kv_heads, _OPTIONS.scale
    )
    oracle.read(query[b, :length], key[b, :length], value[b, :length])
    _same_kept(oracle, start[b], "after the prompt")
    for i in range(num_steps):
      at = length + i
      out = oracle.step(query[b, at], key[b, at], value[b, at], at)
      _same_kept(oracle, kept[i, b], f"sequence {b}, step {i}")
      np.testing.assert_allclose(outs[i, b], out, atol=_TOLERANCE)


def _same_kept(oracle, pos, where):
  for head in oracle.heads:
    found = sorted(int(p) for p in pos[head] if p >= 0)
    assert found == oracle.visible(head), (where, head, found)


class OracleTest(parameterized.TestCase):

  @parameterized.parameters(*policy_oracle.every_policy())
  def test_keeps_what_plain_python_keeps_at_every_step(self, name):
    _check(name, num_heads=4, num_kv_heads=2, num_steps=40)

  @parameterized.product(
      name=list(policy_oracle.every_policy()), heads=((4, 1), (4, 2), (3, 3))
  )
  @pytest.mark.slow
  def test_over_512_steps_grouped_or_not(self, name, heads):
    _check(name, *heads, num_steps=512)


class FieldsTest(parameterized.TestCase):

  @parameterized.parameters(
      ("h2o", dict(decay=0.0), "decay=0.0"),
      ("h2o", dict(score="median"), "median"),
      ("h2o", dict(reduce="vote"), "vote"),
      ("h2o", dict(num_sinks=-1), "num_sinks=-1"),
      ("scissorhands", dict(history=33), "33"),
      ("snapkv", dict(kernel_size=4), "odd"),
      ("pyramidkv", dict(beta=0.5), "beta=0.5"),
      ("keyformer", dict(tau_end=0.0), "tau_end=0.0"),
      ("rkv", dict(mix=1.5), "mix=1.5"),
      ("lagkv", dict(lag_size=1), "lag_size=1"),
      ("expected_attention", dict(num_future=0), "num_future=0"),
  )
  def test_out_of_range_is_named(self, name, fields, message):
    # Where types are checked, values of a Literal are refused before.
    with self.assertRaisesRegex(Exception, message):
      policy_names.from_name(name, **fields)

  def test_protecting_every_slot_is_refused(self):
    with self.assertRaisesRegex(errors.UserError, "protect 8 slots.*at most 7"):
      h2o.H2O(num_sinks=4, num_recent=4).with_capacity(8)
    with self.assertRaisesRegex(errors.UserError, "num_recent=32"):
      snapkv.SnapKV().with_capacity(32)


class PyramidTest(parameterized.TestCase):

  @parameterized.parameters((1, 64), (2, 64), (12, 128), (30, 100), (7, 33))
  def test_layers_fall_and_sum_to_the_budget(self, num_layers, capacity):
    sizes = snapkv.PyramidKV(window=8).capacities(num_layers, capacity)
    self.assertEqual(sum(sizes), num_layers * capacity)
    self.assertEqual(sorted(sizes, reverse=True), list(sizes))
    self.assertGreaterEqual(sizes[-1], 9)
