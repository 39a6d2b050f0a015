"""Each hook is called with what it needs, in one pass and with a cache."""

import dataclasses
from typing import ClassVar
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.inference.cache import kv_cache
from joma.systems import names
from joma.systems.cache_policies.by_place import full
from joma.systems.cache_policies.by_place import window
from joma.transformer import config as configs
from joma.transformer import full_cache
from joma.transformer import hooks
from joma.transformer import layer_hooks
from joma.transformer import model as models
from kernels_pallas import selection
from scansnap_jax.experiment import errors
from tests.joma.transformer import applied

# Several times the largest float32 error seen.
_TOLERANCE = 5e-6


@dataclasses.dataclass(frozen=True)
class Shift:
  """Adds half of the key before, which decoding has to remember."""

  name: ClassVar[str] = "shift"
  axes: ClassVar = {"half": ()}

  def init_params(self, key, config, layer):
    return {"half": jnp.full((), 0.5)}

  def init_state(self, config, layer, batch_size):
    return jnp.zeros((batch_size, config.num_kv_heads, config.head_dim))

  def prepare(self, params, call, query, key, value, state):
    first = jnp.zeros_like(key[:, :1]) if state is None else state[:, None]
    before = jnp.concatenate([first, key[:, :-1]], axis=1)
    if state is not None:
      lengths = (call.positions >= 0).sum(axis=1)
      state = jnp.take_along_axis(
          key, lengths[:, None, None, None] - 1, axis=1
      )[:, 0]
    return query, key + params["half"] * before, value, state


@dataclasses.dataclass(frozen=True)
class Everything:
  """Selects every block; what it keeps is a full cache."""

  name: ClassVar[str] = "everything"
  block: int = 2

  def select(self, params, call, query, key, mask):
    size = query.shape[1]
    return selection.from_mask(
        mask, size, size, block_q=self.block, block_kv=self.block
    )

  def init_cache(self, config, layer, batch_size, capacity, dtype):
    plain = dataclasses.replace(config, attention=())
    return full_cache.init(plain, batch_size, capacity, dtype)[layer]


@dataclasses.dataclass(frozen=True)
class Mean:
  """A mixer: each head returns its value."""

  name: ClassVar[str] = "mean"

  def mix(self, params, call, query, key, value, mask):
    return jnp.repeat(value, query.shape[2] // value.shape[2], axis=2)

  def init_cache(self, config, layer, batch_size, capacity, dtype):
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Observed:
  """Gates, hands on and probes."""

  name: ClassVar[str] = "observed"
  factor: float = 1.0

  def gate(self, params, call, head_out):
    return self.factor * head_out, {"size": jnp.square(head_out).mean()}

  def carry(self, params, call, made):
    return made.value + call.carry.get(self.name, 0)

  def probe(self, params, call, made):
    return {"carried": call.carry.get(self.name, jnp.zeros(()))}


@dataclasses.dataclass(frozen=True)
class Even:
  """All visible keys alike, not by softmax."""

  name: ClassVar[str] = "even"

  def weights(self, params, call):
    even = lambda attn_logits: jnp.where(
        jnp.isneginf(attn_logits), 0, 1
    ) / jnp.maximum((attn_logits > -jnp.inf).sum(axis=-1, keepdims=True), 1)
    return hooks.WeightRule(name=self.name, normalize=even)


_TABLE = {
    system.name: f"{__name__}:{system.__name__}"
    for system in (Shift, Everything, Mean, Observed, Even)
}


def _make(*attention, **changes):
  config = configs.TransformerConfig(
      vocab_size=11,
      num_layers=2,
      embed_dim=16,
      num_heads=4,
      num_kv_heads=2,
      head_dim=8,
      hidden_dim=16,
      attention=attention,
      **changes,
  )
  model = models.Transformer(config, implementation="reference")
  tokens = jax.random.randint(jax.random.key(1), (2, 6), 0, 11)
  params = applied.params(model)
  return model, params, tokens


def _in_steps(model, params, tokens, cache):
  """Logits of a prompt of four tokens, then of the others one by one."""
  positions = jnp.broadcast_to(jnp.arange(6)[None], tokens.shape)
  found = []
  for part in (slice(0, 4), slice(4, 5), slice(5, 6)):
    logits, cache = model.apply(
        {"params": params},
        tokens[:, part],
        positions=positions[:, part],
        kv_cache=cache,
    )
    found.append(logits)
  return jnp.concatenate(found, axis=1)


class HooksTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.enterContext(mock.patch.dict(names.SYSTEMS, _TABLE))

  @pytest.mark.slow
  def test_a_prepared_state_follows_the_tokens(self):
    model, params, tokens = _make("shift")
    self.assertEqual(float(params["layers_1"]["attn"]["shift"]["half"]), 0.5)
    want = model.apply({"params": params}, tokens)
    for cache in (
        full_cache.init(model.config, 2, 8),
        kv_cache.init(full.Full(), model.config, 2, 8),
    ):
      got = _in_steps(model, params, tokens, cache)
      chex.assert_trees_all_close(got, want, atol=_TOLERANCE)
    plain, _, _ = _make()
    other = plain.apply({"params": params}, tokens)
    self.assertGreater(float(jnp.abs(other - want).max()), 1e-3)

  @pytest.mark.slow
  def test_a_cache_without_the_state_is_refused(self):
    model, params, tokens = _make("shift")
    plain, _, _ = _make()
    cache = full_cache.init(plain.config, 2, 8)
    with self.assertRaisesRegex(errors.UserError, "shift carries something"):
      model.apply({"params": params}, tokens, kv_cache=cache)

  @pytest.mark.slow
  def test_a_selection_of_everything_changes_nothing(self):
    model, params, tokens = _make("everything")
    plain, _, _ = _make()
    loss = lambda model, params: model.apply({"params": params}, tokens).sum()
    got, want = (
        jax.value_and_grad(loss, argnums=1)(one, params)
        for one in (model, plain)
    )
    chex.assert_trees_all_close(got, want, atol=20 * _TOLERANCE)

  @pytest.mark.slow
  def test_what_is_sown_is_what_is_selected(self):
    model, params, tokens = _make("everything:block=3")
    plain, _, _ = _make()
    seen = [
        one.apply({"params": params}, tokens, mutable="intermediates")[1]
        for one in (model, plain)
    ]
    chex.assert_trees_all_close(*seen, atol=_TOLERANCE)

  @pytest.mark.slow
  def test_other_weights_are_followed_and_refused_by_caches(self):
    model, params, tokens = _make("even")
    _, seen = model.apply({"params": params}, tokens, mutable="intermediates")
    weights = seen["intermediates"]["layers_0"]["attn"]["attn_weights"][0]
    want = np.tril(np.ones((6, 6))) / np.arange(1, 7)[:, None]
    np.testing.assert_allclose(weights[1, 2], want, atol=_TOLERANCE)
    want = model.apply({"params": params}, tokens)
    got = _in_steps(model, params, tokens, full_cache.init(model.config, 2, 8))
    chex.assert_trees_all_close(got, want, atol=_TOLERANCE)
    cache = kv_cache.init(full.Full(), model.config, 2, 8)
    with self.assertRaisesRegex(errors.UserError, "cannot follow even"):
      model.apply({"params": params}, tokens, kv_cache=cache)
    kernel = model.clone(implementation="pallas_tpu")
    message = "implementation=pallas_tpu knows softmax alone.* even"
    with self.assertRaisesRegex(errors.UserError, message):
      kernel.apply({"params": params}, tokens)

  @pytest.mark.slow
  def test_a_mixer_takes_the_place_of_attention(self):
    model, params, tokens = _make("mean", "softmax")
    change = lambda at: tokens.at[:, at].set((tokens[:, at] + 1) % 11)
    apply = lambda tokens: model.apply(
        {"params": params}, tokens, mutable="intermediates"
    )[1]["intermediates"]
    one, two = apply(tokens), apply(change(0))
    apart = lambda name: jnp.abs(
        one[name]["resid_mlp"][0] - two[name]["resid_mlp"][0]
    )[:, 1:].max()
    self.assertEqual(float(apart("layers_0")), 0.0)
    self.assertGreater(float(apart("layers_1")), 0.0)

  def test_a_policy_has_nothing_to_evict_from(self):
    model, _, _ = _make("softmax", "everything")
    kv_cache.init(full.Full(), model.config, 2, 8)
    message = "window has nothing to evict from in layer 1, where everything"
    with self.assertRaisesRegex(errors.UserError, message):
      kv_cache.init(window.Window(), model.config, 2, 8)

  def test_gate_carry_and_probe(self):
    model, params, tokens = _make("observed:factor=0")
    _, seen = model.apply(
        {"params": params}, tokens, mutable=["intermediates", "losses"]
    )
    attn = seen["intermediates"]["layers_1"]["attn"]
    self.assertEqual(float(jnp.abs(attn["head_out"][0]).max()), 0.0)
    self.assertGreater(float(jnp.abs(attn["observed_carried"][0]).max()), 0.0)
    losses = seen["losses"]["layers_0"]["attn"]["observed_size"]
    self.assertGreater(float(losses[0]), 0.0)
    without = model.apply({"params": params}, tokens, mutable="losses")[1]
    self.assertNotIn("intermediates", without)

  @pytest.mark.slow
  def test_layers_are_computed_anew_with_their_carry(self):
    model, params, tokens = _make("observed+shift")
    loss = lambda params, model: model.apply({"params": params}, tokens).sum()
    want = jax.grad(loss)(params, model)
    got = jax.grad(loss)(params, model.clone(remat="full"))
    chex.assert_trees_all_close(got, want, atol=20 * _TOLERANCE)

  @parameterized.parameters(
      ("even+sinks", "even and sinks both are of the kind weights"),
      ("mean+everything", "mean takes the place of attention"),
      ("everything+mean", "mean takes the place of attention"),
      ("mean+even", "leaves nothing to even"),
  )
  def test_systems_that_do_not_go_together(self, entry, message):
    table = {"sinks": f"{__name__}:_OtherWeights"}
    with mock.patch.dict(names.SYSTEMS, table):
      config = configs.TransformerConfig(attention=(entry,))
      with self.assertRaisesRegex(errors.UserError, message):
        layer_hooks.of_layer(config, 0)


@dataclasses.dataclass(frozen=True)
class _OtherWeights(Even):
  name: ClassVar[str] = "sinks"


if __name__ == "__main__":
  absltest.main()
