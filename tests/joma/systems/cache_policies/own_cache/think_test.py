import dataclasses

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.inference.cache import calls
from joma.inference.cache import kv_cache
from joma.inference.cost import cost_model
from joma.systems.cache_policies.own_cache import think
from scansnap_jax.experiment import errors
from tests.joma.systems.cache_policies import plain
from tests.joma.systems.cache_policies.own_cache import kivi_test

_POLICY = think.ThinK(kept=0.3, num_exact=8, window=3)
_SCALE = kivi_test._OPTIONS.scale


def _oracle(query, key, value, start, policy):
  """The last of queries [T N H] over all keys; `start` tokens were a prompt."""
  size, length = policy.num_exact, len(key)
  last = (length - 1) // size * size
  out = np.zeros_like(query[-1])
  groups = query.shape[1] // key.shape[1]
  for head in range(key.shape[1]):
    mine, keys = range(head * groups, (head + 1) * groups), key[:, head].copy()
    if last:
      # The prompt's last queries, and the steps of the first block.
      asked = [*range(max(start - policy.window, 0), max(start, size))]
      squares = sum(query[t, n] ** 2 for t in asked for n in mine)
      worth = squares * (keys[: max(start, size)] ** 2).sum(axis=0)
      gone = np.argsort(-worth)[3:]  # A third of eight channels, rounded up.
      keys[:last, gone] = 0
    for n in mine:
      weights = plain.softmax(np.float64(_SCALE * keys @ query[-1, n]))
      out[n] = weights @ value[:, head]
  return out


class ThinKTest(parameterized.TestCase):

  def test_is_plain_python_at_every_step(self):
    self._check(12)

  @pytest.mark.slow
  def test_over_512_steps(self):
    self._check(512)

  def _check(self, num_steps):
    draws = np.random.default_rng(0)
    length = max(kivi_test._LENGTHS) + num_steps
    query, key, value = (
        draws.standard_normal((3, length, heads, 8), np.float32)
        for heads in (4, 2, 2)
    )
    key *= 2 * draws.random(8, np.float32)
    run = jax.jit(kivi_test._run, static_argnums=(0, 2, 3))
    arrays = jax.device_put((query, key, value))
    _, (_, outs) = run(_POLICY, arrays, num_steps, length + 3)
    steps = {*range(0, num_steps, max(1, num_steps // 14)), num_steps - 1}
    for b, start in enumerate(kivi_test._LENGTHS):
      for i in sorted(steps):
        stop = start + i + 1
        want = _oracle(
            query[b, :stop], key[b, :stop], value[b, :stop], start, _POLICY
        )
        np.testing.assert_allclose(outs[i, b], want, atol=kivi_test._TOLERANCE)

  @parameterized.product(capacity=(256, 300), dtype=("float32", "bfloat16"))
  def test_bytes_are_those_of_the_cost_model(self, capacity, dtype):
    """Of the default sizes and heads of 64, to the byte."""
    config = dataclasses.replace(kivi_test._CONFIG, head_dim=64, num_layers=2)
    policy = think.ThinK(kept=0.6)
    caches = jax.eval_shape(
        lambda: kv_cache.init(policy, config, 3, capacity, jnp.dtype(dtype))
    )
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(caches))
    load = cost_model.Load(batch_size=3, length=capacity, cache_dtype=dtype)
    plan = calls.plan(policy, (capacity,) * 2, "x")
    self.assertEqual(cost_model.cache_bytes(config, load, plan), held)

  @parameterized.parameters(
      (dict(kept=0.0), "kept=0.0"),
      (dict(num_exact=0), "num_exact=0"),
      (dict(window=0), "window=0"),
  )
  def test_out_of_range_is_named(self, fields, message):
    with self.assertRaisesRegex(errors.UserError, message):
      think.ThinK(**fields)

  def test_what_it_cannot_hold_is_named(self):
    with self.assertRaisesRegex(errors.UserError, "dtype=int8 of a think"):
      kv_cache.init(_POLICY, kivi_test._CONFIG, 1, 8, jnp.int8)
    with self.assertRaisesRegex(errors.UserError, "think keeps rotated keys"):
      kv_cache.init(_POLICY, kivi_test._CONFIG, 1, 8, positions="rolled")


if __name__ == "__main__":
  absltest.main()
