"""Pages in the host's memory: the same tokens, in memory of that kind."""

import dataclasses
import functools

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from joma.inference import decode_steps
from joma.inference import generate
from joma.inference.cache import host_pages
from joma.inference.cost import cache_plan
from joma.inference.cost import chips as cost_chips
from joma.inference.cost import cost_model
from joma.inference.cost import offload
from joma.transformer import config as configs
from joma.transformer import full_cache
from joma.transformer import hooks
from joma.transformer import model as models
from kernels_pallas.aot import chips
from kernels_pallas.aot import topology
from scansnap_jax.experiment import errors
from tests.joma.transformer import applied

_CONFIG = configs.TransformerConfig(
    vocab_size=61,
    num_layers=2,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    hidden_dim=24,
    max_len=256,
    windows=(0, 5),
    attn_logits_soft_cap=3.0,
)
_OPTIONS = hooks.AttentionOptions(
    scale=0.3, logits_soft_cap=None, window=None, implementation=None
)


def _layer(page_size, capacity=12, batch=2):
  config = dataclasses.replace(_CONFIG, num_layers=1, windows=())
  (cache,) = host_pages.make(config, batch, capacity, jnp.float32, page_size)
  return cache


def _tokens(length, seed=0, batch=2):
  draw = np.random.default_rng(seed)
  arrays = [
      draw.normal(size=(batch, length, heads, 8)).astype(np.float32)
      for heads in (4, 2, 2)
  ]
  return arrays


@functools.partial(
    jax.jit,
    static_argnums=0,
    compiler_options={"xla_backend_optimization_level": "0"},
)
def _step(options, cache, *given):
  return cache.attend(*given, lambda x, _: x, options)


def _attend(cache, tokens, positions, options=_OPTIONS):
  out, cache = _step(options, cache, *map(jnp.asarray, (*tokens, positions)))
  return np.asarray(out), cache


class HostCacheTest(parameterized.TestCase):

  def test_a_step_is_softmax_over_all_before_it(self):
    """A prompt of 3 and 2 tokens, then steps over three pages of 2 slots."""
    cache, kept = _layer(2), [[], []]
    self.assertEqual(cache.key.sharding.memory_kind, host_pages.HOST)
    query, key, value = _tokens(3)
    places = np.array([[0, 1, 2], [0, 1, -1]])
    _, cache = _attend(cache, (query, key, value), places)
    for row, length in enumerate((3, 2)):
      kept[row] += [(key[row, t], value[row, t]) for t in range(length)]
    for step in range(4):
      query, key, value = _tokens(1, seed=1 + step)
      # The second text has ended before the last step.
      second = 2 + step if step < 3 else -1
      out, cache = _attend(cache, (query, key, value), [[3 + step], [second]])
      for row in range(2 if step < 3 else 1):
        kept[row].append((key[row, 0], value[row, 0]))
        keys, values = (np.stack(x) for x in zip(*kept[row], strict=True))
        for head in range(4):
          logits = 0.3 * keys[:, head // 2] @ query[row, 0, head]
          weights = np.exp(logits - logits.max())
          want = weights @ values[:, head // 2] / weights.sum()
          np.testing.assert_allclose(out[row, 0, head], want, atol=1e-5)
      self.assertEqual(cache.key.sharding.memory_kind, host_pages.HOST)
    self.assertEqual(int(cache.count), 7)
    np.testing.assert_array_equal(
        np.asarray(cache.pos)[1, :7], [0, 1, -1, 2, 3, 4, -1]
    )

  @pytest.mark.slow
  def test_a_full_cache_makes_nan_and_says_its_size(self):
    cache = dataclasses.replace(
        _layer(2, capacity=3), count=jnp.int32(4), is_new=False
    )
    self.assertEqual(cache.num_positions(), 4)
    out, _ = _attend(cache, _tokens(1), [[4], [4]])
    self.assertTrue(np.isnan(out).all())

  def test_a_cpu_has_nothing_to_offload_to(self):
    with self.assertRaisesRegex(errors.UserError, "nothing to offload to"):
      host_pages.init(_CONFIG, 1, 8)
    host_pages.check_device("tpu")
    with self.assertRaisesRegex(errors.UserError, "page_size must be"):
      _layer(0)

  @pytest.mark.slow
  def test_systems_that_it_cannot_follow_are_refused(self):
    config = dataclasses.replace(_CONFIG, attention=("key_bias",))
    model = models.Transformer(config)
    cache = host_pages.make(config, 1, 8, jnp.float32, 4)
    with self.assertRaisesRegex(errors.UserError, "HostCache"):
      generate.check_follows(model, 1, lambda: cache)

  @parameterized.parameters(1, 4, 64)
  @pytest.mark.slow
  def test_tokens_are_those_of_the_device_cache(self, page_size):
    """Windows, a soft cap, prompts of unlike lengths, and a second prompt."""
    model = models.Transformer(_CONFIG)
    params = applied.params(model)
    prompts = [np.arange(7), np.arange(3) + 11, np.arange(13) * 3 % 61]
    run = lambda cache: generate.stream(
        model, params, prompts, max_new_tokens=20, kv_cache=cache
    )
    plain = run(full_cache.init(_CONFIG, 3, 64))
    paged = run(host_pages.make(_CONFIG, 3, 40, jnp.float32, page_size))
    for (want, _), (got, _) in zip(plain, paged, strict=True):
      np.testing.assert_array_equal(got, want)
    more = [prompt[:4] for prompt in prompts]
    starts = np.array([7, 3, 13]) + 19
    follow = lambda steps: generate.generate(
        model, params, more, max_new_tokens=3, starts=starts,
        kv_cache=steps.last.kv_cache, donate_cache=True,
    )  # fmt: skip
    for want, got in zip(follow(plain), follow(paged), strict=True):
      np.testing.assert_array_equal(got, want)


def _compiled(config, batch, length, page_size):
  """A step of decoding on a v5e that is not there, caches in its host."""
  mesh = topology.device_mesh(chips.get_chip("v5e"), 1)
  place = lambda kind: NamedSharding(mesh, PartitionSpec(), memory_kind=kind)
  put = lambda leaf, kind="device", dtype=None: jax.ShapeDtypeStruct(
      leaf.shape, dtype or leaf.dtype, sharding=place(kind)
  )
  tokens = jnp.zeros((1, 2), jnp.int32)
  model = models.Transformer(config, implementation="reference")
  params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
  params = jax.tree.map(lambda leaf: put(leaf, dtype=jnp.bfloat16), params)
  caches = jax.eval_shape(
      lambda: host_pages.make(config, batch, length, jnp.bfloat16, page_size)
  )
  caches = tuple(
      dataclasses.replace(
          jax.tree.map(put, cache),
          key=put(cache.key, host_pages.HOST),
          value=put(cache.value, host_pages.HOST),
          is_new=False,
      )
      for cache in caches
  )
  ids = jnp.zeros(batch, jnp.int32)
  state = jax.eval_shape(lambda: decode_steps.state_of(ids, ids, ()))
  state = dataclasses.replace(jax.tree.map(put, state), kv_cache=caches)
  run = models.Transformer(config, jnp.bfloat16)
  return topology.compiled(decode_steps.decode_step.lower(run, params, state))


@absltest.skipUnless(topology.has_toolchain("tpu"), "libtpu is not installed")
class TpuTest(parameterized.TestCase):

  @parameterized.parameters(128, 64)
  @pytest.mark.slow
  def test_a_step_for_v5e_holds_what_the_plan_says(self, head_dim):
    """Within 5 %; all pages, and nothing else, are the host's, in place."""
    config = configs.TransformerConfig(
        vocab_size=32_000, num_layers=2, embed_dim=1024, num_heads=8,
        num_kv_heads=8, head_dim=head_dim, hidden_dim=4096, max_len=4096,
    )  # fmt: skip
    batch, length, page_size = 8, 2048, 128
    memory = _compiled(config, batch, length, page_size).memory_analysis()
    load = cost_model.Load(batch_size=batch, length=length)
    work = offload.work_of(config, load, cache_plan.full(), page_size)
    machine = offload.Machine(
        chip=cost_chips.get("v5e"), host_bytes=10**12, link_bytes_per_sec=1e10
    )
    where = offload.Placement(
        host_weights=0, host_cache=2, host_stream=False, batch_size=batch
    )
    plan = offload.of_placement(work, machine, where)
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    held += memory.output_size_in_bytes - memory.alias_size_in_bytes
    self.assertAlmostEqual(held / plan.device_bytes, 1, delta=0.05)
    self.assertEqual(memory.host_argument_size_in_bytes, plan.host_bytes)
    self.assertEqual(memory.host_alias_size_in_bytes, plan.host_bytes)
    self.assertEqual(memory.host_temp_size_in_bytes, 0)
    # Without the host's memory the chip would hold all pages.
    on_chip = dataclasses.replace(where, host_cache=0)
    plain = offload.of_placement(work, machine, on_chip)
    self.assertGreater(plain.device_bytes, 1.2 * held)


if __name__ == "__main__":
  absltest.main()
