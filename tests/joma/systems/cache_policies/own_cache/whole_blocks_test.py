"""Kivi's steps by the op on codes: whole blocks of 128 tokens, heads of 128."""

import dataclasses
import functools

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.inference.cache import calls
from joma.inference.cache import kv_cache
from joma.inference.cost import cost_model
from joma.systems.cache_policies.own_cache import kivi
from joma.transformer import config as configs
from joma.transformer import hooks
from kernels_pallas import interpret
from kernels_pallas.aot import compile as compile_lib
from kernels_pallas.aot import topology
from kernels_pallas.decode.coded import codes
from tests.joma.systems.cache_policies import plain
from tests.joma.systems.cache_policies.own_cache import int4_test

_CONFIG = configs.TransformerConfig(
    vocab_size=5,
    num_layers=1,
    embed_dim=8,
    num_heads=2,
    num_kv_heads=1,
    head_dim=128,
    hidden_dim=8,
    max_len=1024,
)
_POLICY = kivi.Kivi(num_exact=128, group_size=128)
_SCALE = 0.1
# The first ends a block at its third step, the second has nothing coded.
_LENGTHS, _STEPS, _CAPACITY = (253, 20), 6, 300


def _draw():
  draws = np.random.default_rng(0)
  length = max(_LENGTHS) + _STEPS
  query, key, value = (
      draws.standard_normal((2, length, heads, 128), np.float32)
      for heads in (2, 1, 1)
  )
  return query, key + 2 * draws.standard_normal(128, np.float32), value


@functools.partial(jax.jit, static_argnames=("options",))
def _run(cache, arrays, options):
  """Outputs of prompts and steps [B, S, N, H]."""
  lengths, turn = jnp.array(_LENGTHS), lambda x, positions: x
  given = hooks.AttentionOptions(scale=_SCALE, **dict(options))
  steps = jnp.arange(max(_LENGTHS))[None]
  positions = jnp.where(steps < lengths[:, None], steps, -1)
  first = [x[:, : max(_LENGTHS)] for x in arrays]
  plain_options = dataclasses.replace(given, implementation="reference")
  _, cache = cache.attend(*first, positions, turn, plain_options)
  outs = []
  for i in range(_STEPS):
    at = lengths + i
    pick = lambda x, at=at: jnp.take_along_axis(
        x, at[:, None, None, None], axis=1
    )
    out, cache = cache.attend(*map(pick, arrays), at[:, None], turn, given)
    outs.append(out[:, 0])
  return jnp.stack(outs, axis=1)


def _oracle(query, key, value):
  """One query [N H] over keys and values [T 1 H] up to its own."""
  last = (len(key) - 1) // 128 * 128
  keys, values = key[:, 0].copy(), value[:, 0].copy()
  if last:
    keys[:last] = int4_test.plain(keys[:last], "tokens", 128)[1]
    values[:last] = int4_test.plain(values[:last], "channels", 128)[1]
  weights = [plain.softmax(np.float64(_SCALE * keys @ q)) for q in query]
  return np.stack([w @ values for w in weights])


class WholeBlocksTest(parameterized.TestCase):

  @parameterized.parameters("xla", "pallas_tpu")
  @pytest.mark.by_default(0)
  def test_is_plain_python_at_every_step(self, implementation):
    arrays = _draw()
    (cache,) = kv_cache.init(_POLICY, _CONFIG, 2, _CAPACITY)
    self.assertIsInstance(cache.key, codes.Blocks)
    with interpret.interpreted():
      outs = _run(cache, arrays, (("implementation", implementation),))
    query, key, value = arrays
    for b, length in enumerate(_LENGTHS):
      for i in range(_STEPS):
        stop = length + i + 1
        want = _oracle(query[b, stop - 1], key[b, :stop], value[b, :stop])
        np.testing.assert_allclose(outs[b, i], want, atol=2e-5)

  @pytest.mark.slow
  def test_what_the_op_does_not_know_is_decoded(self):
    """With a cap no logit comes near, and a window of all, nothing changes."""
    arrays = _draw()
    (cache,) = kv_cache.init(_POLICY, _CONFIG, 2, _CAPACITY)
    want = _run(cache, arrays, ())
    for more in (("logits_soft_cap", 1e6), ("window", 999)):
      found = _run(cache, arrays, (more,))
      np.testing.assert_allclose(found, want, atol=2e-5)
    near = _run(cache, arrays, (("window", 3),))
    self.assertGreater(float(jnp.abs(near - want).max()), 0.1)

  def test_other_sizes_stand_as_before(self):
    for policy, config, capacity in (
        (kivi.Kivi(), _CONFIG, 300),
        (_POLICY, dataclasses.replace(_CONFIG, head_dim=64), 300),
        (_POLICY, _CONFIG, 127),
    ):
      (cache,) = jax.eval_shape(
          lambda p=policy, c=config, n=capacity: kv_cache.init(p, c, 1, n)
      )
      self.assertNotIsInstance(cache.key, codes.Blocks)

  def test_bytes_are_those_of_the_cost_model(self):
    caches = jax.eval_shape(lambda: kv_cache.init(_POLICY, _CONFIG, 3, 300))
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(caches))
    load = cost_model.Load(batch_size=3, length=300, cache_dtype="float32")
    plan = calls.plan(_POLICY, (300,), "x")
    self.assertEqual(cost_model.cache_bytes(_CONFIG, load, plan), held)


@absltest.skipUnless(topology.has_toolchain("tpu"), "libtpu is not installed")
class CompiledTest(parameterized.TestCase):

  @parameterized.parameters("v5e", "v6e")
  @pytest.mark.slow
  def test_a_step_on_a_tpu_is_the_kernel_and_decodes_nothing(self, chip):
    """Of 8 key heads and 4,096 tokens: keys and values are 16 MiB decoded."""
    config = dataclasses.replace(_CONFIG, num_heads=32, num_kv_heads=8)
    config = dataclasses.replace(config, max_len=4096)
    (cache,) = jax.eval_shape(
        lambda: kv_cache.init(_POLICY, config, 1, 4096, jnp.bfloat16)
    )
    like = lambda heads: jax.ShapeDtypeStruct((1, 1, heads, 128), jnp.bfloat16)
    options = hooks.AttentionOptions(scale=_SCALE)
    step = jax.jit(
        lambda cache, *x: cache.attend(*x, lambda x, at: x, options),
        donate_argnums=0,
    )
    position = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    arrays = (like(32), like(8), like(8), position)
    compiled = compile_lib.compile_for(chip, step, cache, *arrays)
    self.assertIn("coded_decode", " ".join(compiled.scoped_vmem_bytes))
    # A block that is full is coded from float32: half a MiB of keys, of values.
    self.assertLess(compiled.temp_bytes, 1.25 * (1 << 20))


if __name__ == "__main__":
  absltest.main()
