"""Slot caches; what every policy holds to is in `tests/laws/policies_test`."""

import dataclasses
import functools

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.inference.cache import calls
from joma.inference.cache import kv_cache
from joma.inference.cache import slot_step
from joma.systems.cache_policies import names as policy_names
from joma.systems.cache_policies.by_attention import h2o
from joma.systems.cache_policies.by_attention import scissorhands
from joma.systems.cache_policies.by_attention import snapkv
from joma.systems.cache_policies.by_attention import tova
from joma.systems.cache_policies.by_key import knorm
from joma.systems.cache_policies.by_place import full
from joma.systems.cache_policies.by_place import window
from joma.transformer import config as configs
from joma.transformer import full_cache
from joma.transformer import hooks
from joma.transformer import model as models
from joma.transformer.rope import config as rope_config
from kernels_pallas import interpret
from scansnap_jax.experiment import errors
from tests.joma.transformer import applied
from tests.laws import policy_laws

_CONFIG = configs.TransformerConfig(
    vocab_size=50,
    num_layers=2,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    hidden_dim=24,
    max_len=64,
    windows=(0, 9),
)
_ONE_LAYER = dataclasses.replace(_CONFIG, num_layers=1, windows=())
_MODEL = models.Transformer(_CONFIG, implementation="reference")
_TOKENS = jax.random.randint(jax.random.key(0), (3, 40), 0, 50)
_LENGTHS, _STEPS = jnp.array([5, 11, 1]), 20
# After all steps, of a model and of one layer alone.
_NEXT = _LENGTHS + _STEPS


@functools.cache
def _params():
  with jax.ensure_compile_time_eval():
    return applied.params(_MODEL, 1)


@functools.partial(jax.jit, static_argnames="model")
def _read_and_decode(kv_cache, model=_MODEL):
  """Logits [steps, B, V] of ragged prompts of up to 16, then of each token."""
  steps = jnp.arange(16)[None]
  positions = jnp.where(steps < _LENGTHS[:, None], steps, -1)
  apply = functools.partial(model.apply, {"params": _params()})
  first, kv_cache = apply(
      _TOKENS[:, :16],
      positions=positions,
      kv_cache=kv_cache,
      logits_at=_LENGTHS - 1,
  )

  def step(kv_cache, i):
    at = (_LENGTHS + i)[:, None]
    token = jnp.take_along_axis(_TOKENS, at, axis=1)
    logits, kv_cache = apply(token, positions=at, kv_cache=kv_cache)
    return kv_cache, logits[:, 0]

  kv_cache, rest = jax.lax.scan(step, kv_cache, jnp.arange(_STEPS))
  return jnp.concatenate([first.swapaxes(0, 1), rest]), kv_cache


@functools.partial(jax.jit, static_argnames="model")
def _one_pass(model, tokens):
  return model.apply({"params": _params()}, tokens)


@functools.cache
def _rolled():
  """A layer of which ranks are kept, with three recent tokens of 12."""
  policy = h2o.H2O(num_recent=3)
  cache = policy_laws.init(policy, 12, positions="rolled")
  return policy_laws.run(cache, policy_laws.draw()).cache


class ModelTest(parameterized.TestCase):

  @pytest.mark.slow
  def test_with_room_for_all_a_model_gives_the_bits_of_a_full_cache(self):
    model = models.Transformer(_CONFIG, implementation="xla")
    want, _ = _read_and_decode(full_cache.init(_CONFIG, 3, 32), model=model)
    caches = kv_cache.init(h2o.H2O(), _CONFIG, 3, 32)
    got, _ = _read_and_decode(caches, model=model)
    np.testing.assert_array_equal(got, want)

  @parameterized.parameters(
      dict(rope_type="dynamic", factor=4.0),
      dict(rope_type="linear", factor=4.0),
      dict(rope_type="yarn", factor=4.0, original_max_len=8),
      dict(
          rope_type="longrope",
          short_factor=(1.0, 1.1, 1.2, 1.3),
          long_factor=(1.5, 2.0, 3.0, 4.0),
          original_max_len=8,
          factor=4.0,
      ),
  )
  @pytest.mark.slow
  def test_every_scaling_equals_the_model_without_a_cache(self, **rope):
    """One layer: later keys hold what earlier frequencies gave."""
    config = dataclasses.replace(
        _ONE_LAYER,
        rope=rope_config.RopeConfig(**rope),
        max_len=8 if rope["rope_type"] == "dynamic" else 32,
    )
    model = models.Transformer(config, implementation="reference")
    for caches in (
        kv_cache.init(h2o.H2O(), config, 3, 32, keys="raw"),
        full_cache.init(config, 3, 32),
    ):
      got, _ = _read_and_decode(caches, model=model)
      for row, length in enumerate(np.asarray(_NEXT)):
        # Frequencies follow the length of a text: no padding here.
        want = model.apply({"params": _params()}, _TOKENS[row][None, :length])
        np.testing.assert_allclose(got[-1, row], want[0, -1], atol=2e-5)

  @parameterized.parameters(
      window.StreamingLLM(num_sinks=2),
      h2o.H2O(),
  )
  @pytest.mark.slow
  def test_keys_kept_before_rotation_give_the_same(self, policy):
    make = functools.partial(kv_cache.init, policy, _CONFIG, 3, 8)
    want, _ = _read_and_decode(make())
    got, _ = _read_and_decode(make(keys="raw"))
    # Rotations are done at another place: rounding alone.
    np.testing.assert_allclose(got, want, atol=1e-5)

  @pytest.mark.slow
  def test_rolled_positions_are_those_of_a_window_read_by_itself(self):
    """One layer, and a window: what is kept is a text of its own."""
    model = models.Transformer(_ONE_LAYER, implementation="reference")
    caches = kv_cache.init(
        window.Window(), _ONE_LAYER, 3, 8, positions="rolled"
    )
    got, caches = _read_and_decode(caches, model=model)
    texts = [_TOKENS[row, end - 8 : end] for row, end in enumerate(_NEXT)]
    want = _one_pass(model, jnp.stack(texts))[:, -1]
    np.testing.assert_allclose(got[-1], want, atol=2e-5)
    order = np.argsort(np.argsort(caches[0].pos))
    np.testing.assert_array_equal(caches[0].rank, order)


class ChangingFrequenciesTest(parameterized.TestCase):
  """Dynamic NTK beyond its window: a text by steps is the text at once."""

  @functools.cached_property
  def config(self):
    rope = rope_config.RopeConfig(rope_type="dynamic", factor=4.0)
    return dataclasses.replace(_ONE_LAYER, rope=rope, max_len=8)

  @parameterized.parameters(
      *sorted(set(policy_names.POLICIES) - {"quest", "kivi", "think"})
  )
  @pytest.mark.slow
  def test_with_every_policy(self, name):
    model = models.Transformer(self.config, implementation="reference")
    policy = policy_names.parse(name)
    got, _ = _read_and_decode(
        kv_cache.init(policy, self.config, 3, 64), model=model
    )
    for row, length in enumerate(np.asarray(_NEXT)):
      want = model.apply({"params": _params()}, _TOKENS[row][None, :length])
      np.testing.assert_allclose(got[-1, row], want[0, -1], atol=2e-5)

  @parameterized.parameters("quest", "kivi", "think", "adakv:h2o")
  def test_caches_of_rotated_keys_say_why(self, name):
    message = "keeps rotated keys, which rope_type=dynamic turns anew"
    with self.assertRaisesRegex(errors.UserError, message):
      kv_cache.init(policy_names.parse(name), self.config, 1, 32)


class OverflowTest(absltest.TestCase):

  @pytest.mark.slow
  def test_a_full_policy_that_overflows_gives_nan_from_there(self):
    (cache,) = kv_cache.init(full.Full(), policy_laws.CONFIG, 3, 16)
    outs = policy_laws.run(cache, policy_laws.draw()).steps
    is_nan = np.isnan(outs).any(axis=(2, 3, 4))
    # Step s of a prompt of n tokens is the one at position n + s.
    position = np.asarray(_LENGTHS)[None] + np.arange(_STEPS)[:, None]
    np.testing.assert_array_equal(is_nan, position >= 16)


class CompilationTest(absltest.TestCase):

  def test_many_steps_are_one_trace_and_donate_the_cache(self):
    model = models.Transformer(_ONE_LAYER, implementation="reference")

    @functools.partial(jax.jit, donate_argnums=0)
    @chex.assert_max_traces(n=1)
    def step(caches, token, position):
      logits, caches = model.apply(
          {"params": _params()}, token, positions=position, kv_cache=caches
      )
      return caches, logits[:, 0].argmax(-1)[:, None]

    chex.clear_trace_counter()
    caches = kv_cache.init(h2o.H2O(num_sinks=1), model.config, 2, 16)
    token, first = jnp.array([[1], [2]]), caches[0].key.data
    for position in range(500):
      caches, token = step(caches, token, jnp.full((2, 1), position))
    self.assertTrue(first.is_deleted())
    self.assertEqual(int(caches[0].pos.max()), 499)
    self.assertEqual(int(caches[0].pos.min()), 0)  # The sink.


class RankTest(parameterized.TestCase):

  @parameterized.parameters(1, 2)
  @pytest.mark.by_default(0)
  def test_ranks_stay_in_the_order_of_positions(self, page_size):
    cache = _rolled()
    if page_size == 2:
      policy = h2o.H2O(num_recent=2)
      cache = policy_laws.init(
          policy, 8, positions="rolled", page_size=page_size
      )
      cache = policy_laws.run(cache, policy_laws.draw()).cache
    pos = np.asarray(cache.pos)
    order = np.argsort(np.argsort(np.where(pos < 0, 999, pos)))
    np.testing.assert_array_equal(cache.rank, np.where(pos < 0, -1, order))


class PageTest(absltest.TestCase):

  @pytest.mark.slow
  def test_the_page_of_least_sum_leaves_whole(self):
    caches = kv_cache.init(
        h2o.H2O(num_sinks=1, num_recent=2), _CONFIG, 3, 8, page_size=4
    )
    cache = dataclasses.replace(
        caches[0],
        pos=jnp.broadcast_to(jnp.arange(1, 9)[None, None], (3, 2, 8)),
        score=jnp.broadcast_to(
            jnp.array([9, 1, 1, 1, 2, 2, 2, 2.0])[None, None], (3, 2, 8)
        ),
    )
    slot, freed = slot_step.choose_slot(cache, jnp.array([20, 10, 9]))
    # 12 against 8; at 10 and at 9 the last tokens protect the second page.
    np.testing.assert_array_equal(slot[:, 0], [4, 0, 0])
    np.testing.assert_array_equal(freed[:, 1].sum(-1), [4, 4, 4])
    np.testing.assert_array_equal(freed[0, 0], [0] * 4 + [1] * 4)


class StorageTest(parameterized.TestCase):

  @parameterized.parameters((jnp.bfloat16, 2**-7), (jnp.int8, 2**-6))
  @pytest.mark.slow
  def test_narrow_types_are_near_and_smaller(self, dtype, tolerance):
    # Policies that read no attention keep the same tokens.
    policy = window.StreamingLLM(num_sinks=2)
    want = policy_laws.read(policy, policy_laws.FEW)
    cache = policy_laws.init(policy, policy_laws.FEW, dtype=dtype)
    got = policy_laws.run(cache, policy_laws.draw())
    error = np.abs(got.steps - want.steps).max()
    # Values are up to 4.
    self.assertLess(error, 4 * tolerance)
    self.assertGreater(error, 0)
    np.testing.assert_array_equal(got.kept, want.kept)
    self.assertEqual(got.cache.score.dtype, jnp.float32)
    size = lambda seen: seen.cache.key.data.nbytes
    self.assertEqual(size(want) // size(got), 4 // jnp.dtype(dtype).itemsize)


class KernelTest(parameterized.TestCase):
  """One kernel does the whole step of a policy."""

  @parameterized.parameters((jnp.float32, 8), (jnp.int8, 32))
  @pytest.mark.slow
  def test_of_h2o(self, dtype, capacity):
    self._check(h2o.H2O(num_sinks=1, score="ema"), dtype, capacity)

  @parameterized.parameters(
      scissorhands.Scissorhands(history=5),
      snapkv.SnapKV(window=3),
      tova.TOVA(),
      knorm.Knorm(),
      window.Window(),
      window.StreamingLLM(num_sinks=2),
      h2o.H2O(score="mean", reduce="max"),
  )
  # A gain, and scores of the policy's own; the kernel's own tests see the other
  # options.
  @pytest.mark.by_default(1)
  def test_of(self, policy):
    self._check(policy, jnp.float32, 8)

  def _check(self, policy, dtype, capacity):
    policy = policy.with_capacity(capacity)
    self.assertIsNotNone(calls.kernel_options(policy))
    draws = jax.random.split(jax.random.key(0), 3)
    arrays = [
        jax.random.normal(draw, (40, 2, 1, heads, 8))
        for draw, heads in zip(draws, (4, 2, 2), strict=True)
    ]

    def run(implementation):
      options = hooks.AttentionOptions(scale=0.3, implementation=implementation)

      def step(cache, inputs):
        i, query, key, value = inputs
        at = jnp.stack([i, i - 3])[:, None]  # The second one starts later.
        at = jnp.maximum(at, -1)
        # As a rotation that rounds norms: no score may hang on it.
        turn = lambda x, positions: x * jnp.float32(1 + 1e-6)
        out, cache = cache.attend(query, key, value, at, turn, options)
        is_active = (at >= 0)[..., None, None]
        return cache, (jnp.where(is_active, out, 0), cache.pos)

      cache = kv_cache.init_layer(policy, 0, (2, 2, capacity, 8), 2, dtype)
      return jax.lax.scan(step, cache, (jnp.arange(40), *arrays))

    with interpret.interpreted():
      cache, (outs, kept) = run("pallas_tpu")
    want, (want_outs, want_kept) = run("xla")
    np.testing.assert_array_equal(kept, want_kept)
    np.testing.assert_allclose(outs, want_outs, atol=1e-5)
    atol = 0 if isinstance(policy, knorm.Knorm) else 1e-5
    np.testing.assert_allclose(cache.score, want.score, rtol=0, atol=atol)
    chex.assert_trees_all_equal(cache.aux, want.aux)


class CompactTest(absltest.TestCase):

  def test_keeps_the_best_in_order_and_grows_with_empty_slots(self):
    cache = _rolled()
    small = kv_cache.compact(cache, 6, _NEXT)
    for b in range(3):
      for head in range(2):
        pos, score = np.asarray(cache.pos[b, head]), cache.score[b, head]
        recent = sorted(pos)[-3:]
        others = [c for c in range(12) if pos[c] not in recent]
        others.sort(key=lambda c: -score[c])
        want = sorted([*recent, *pos[others[:3]]])
        self.assertEqual(list(map(int, small.pos[b, head])), want)
    slot = int(jnp.argmax(cache.pos[0, 0] == small.pos[0, 0, 2]))
    np.testing.assert_array_equal(
        small.key.data[0, 0, 2], cache.key.data[0, 0, slot]
    )
    large = kv_cache.compact(cache, 20, _NEXT)
    self.assertEqual(int((large.pos < 0).sum()), 3 * 2 * 8)

  def test_ranks_of_what_stays_are_those_of_its_positions(self):
    # Growing, the empty slots come last and have no rank.
    for capacity in (6, 16):
      cache = kv_cache.compact(_rolled(), capacity, _NEXT)
      pos, num = np.asarray(cache.pos), min(capacity, 12)
      self.assertTrue((np.diff(pos[..., :num]) > 0).all())
      want = np.where(np.arange(capacity) < num, np.arange(capacity), -1)
      np.testing.assert_array_equal(
          cache.rank, np.broadcast_to(want, (3, 2, capacity))
      )

  def test_more_protected_than_slots_is_refused(self):
    caches = kv_cache.init(h2o.H2O(num_recent=6), _CONFIG, 3, 12)
    with self.assertRaisesRegex(
        errors.UserError, "num_recent=6.*capacity of 4"
    ):
      kv_cache.compact(caches[0], 4, _LENGTHS)


class StatsTest(absltest.TestCase):

  @pytest.mark.slow
  def test_nothing_evicted_keeps_all_mass(self):
    cache = policy_laws.read(h2o.H2O(), policy_laws.ALL).cache
    stats = kv_cache.stats(cache, _NEXT)
    np.testing.assert_allclose(stats["kept_mass"], 1, atol=1e-5)
    want = np.broadcast_to(_NEXT[:, None], (3, 2))
    np.testing.assert_allclose(stats["occupancy"], want / 32)
    np.testing.assert_array_equal(stats["max_age"], want)
    np.testing.assert_allclose(stats["mean_age"], (want + 1) / 2)

  @pytest.mark.slow
  def test_what_leaves_takes_its_mass_along(self):
    stats = lambda policy: kv_cache.stats(
        policy_laws.read(policy, policy_laws.FEW).cache, _NEXT
    )
    mass = stats(h2o.H2O())["kept_mass"]
    self.assertTrue((np.asarray(mass) < 1).all())
    # Its score is no sum of attention.
    self.assertNotIn("kept_mass", stats(window.Window()))


class ShardingTest(absltest.TestCase):

  def test_heads_on_two_devices_keep_the_same_without_talking(self):
    if jax.device_count() < 2:
      self.skipTest("needs two devices")
    mesh = jax.make_mesh(
        (2,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    spec = jax.sharding.PartitionSpec(None, "tensor")
    caches = kv_cache.init(h2o.H2O(), _CONFIG, 3, 8)
    want, want_caches = _read_and_decode(caches)
    split = jax.device_put(caches, jax.sharding.NamedSharding(mesh, spec))
    got, got_caches = _read_and_decode(split)
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_array_equal(got_caches[0].pos, want_caches[0].pos)


class RefusalTest(parameterized.TestCase):

  @parameterized.parameters(
      (dict(capacity=0), "capacity"),
      (dict(capacity=65), "65 is above the model's 64 positions"),
      (dict(capacity=9, page_size=4), "page_size=4 must divide"),
      (dict(positions="relative"), "relative"),
      (dict(keys="cold"), "cold"),
      (dict(positions="rolled", keys="rotated"), "keys='raw'"),
      (dict(dtype=jnp.int32), "int32"),
      (dict(batch_size=0), "batch_size"),
  )
  def test_what_does_not_fit_is_named(self, changes, message):
    arguments = dict(batch_size=2, capacity=16) | changes
    with self.assertRaisesRegex(Exception, message):
      kv_cache.init(window.Window(), _CONFIG, **arguments)

  def test_learned_positions_cannot_be_rolled(self):
    config = dataclasses.replace(_CONFIG, positions="learned")
    with self.assertRaisesRegex(errors.UserError, "needs rotary positions"):
      kv_cache.init(window.Window(), config, 2, 16, positions="rolled")
