"""Lightning attention beside the recurrence, in one pass and in steps."""

import dataclasses
import functools
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from joma.inference.cache import kv_cache
from joma.systems.cache_policies.by_attention import h2o
from joma.systems.mixers import lightning
from joma.transformer import config as configs
from joma.transformer import full_cache
from joma.transformer import model as models
from kernels_pallas import masks
from scansnap_jax.experiment import errors
from tests.joma.systems import one_layer
from tests.joma.transformer import applied

# The acceptance; what is seen is a tenth of it.
_TOLERANCE = 1e-5


@functools.cache
def _model(*attention, **changes):
  config = configs.TransformerConfig(
      vocab_size=17,
      num_layers=2,
      embed_dim=16,
      num_heads=4,
      num_kv_heads=2,
      head_dim=8,
      hidden_dim=16,
      attention=attention or ("lightning",),
      **changes,
  )
  model = models.Transformer(config, implementation="xla")
  tokens = jax.random.randint(jax.random.key(1), (3, 12), 0, 17)
  params = applied.params(model)
  return model, params, tokens


def _oracle(query, key, value, decay, scale):
  """The recurrence of one head and sequence, row by row."""
  silu = lambda x: x / (1 + np.exp(-x))
  state, rows = np.zeros((query.shape[1],) * 2), []
  for one in range(len(query)):
    state = decay * state + np.outer(silu(key[one]), silu(value[one]))
    rows.append(scale * silu(query[one]) @ state)
  return np.stack(rows)


def _in_steps(model, params, tokens, lengths, cache, step=applied.step):
  """Logits of the last prompt token, then of single tokens, a list a row."""
  total, prompt = tokens.shape[1], int(lengths.max())
  steps = jnp.arange(prompt)[None]
  positions = jnp.where(steps < lengths[:, None], steps, -1)
  padded = jnp.where(positions < 0, 0, tokens[:, :prompt])
  logits, cache = step(model, params, padded, positions, cache)
  rows = [[] for _ in tokens]
  for row, length in enumerate(lengths):
    rows[row].append(logits[row, length - 1])
  position = lengths
  for _ in range(total - int(lengths.min())):
    # Rows that have come to their ends wait: their position is -1.
    active = position < total
    at = jnp.where(active, position, 0)
    one = jnp.take_along_axis(tokens, at[:, None], axis=1)
    where = jnp.where(active, position, -1)[:, None]
    logits, cache = step(model, params, one, where, cache)
    for row in np.flatnonzero(active):
      rows[row].append(logits[row, 0])
    position = position + active
  return [jnp.stack(row) for row in rows]


class LightningTest(parameterized.TestCase):

  def test_one_pass_is_the_recurrence(self):
    model, params, tokens = _model()
    run = jax.jit(functools.partial(model.apply, mutable="intermediates"))
    _, sown = run({"params": params}, tokens)
    seen = sown["intermediates"]["layers_1"]["attn"]
    attn = params["layers_1"]["attn"]
    x = np.asarray(sown["intermediates"]["layers_0"]["resid_mlp"][0])
    x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5)
    x = x * np.asarray(params["layers_1"]["attn_norm"]["scale"])
    project = lambda name: np.einsum(
        "TD,DNH->TNH", x[1], np.asarray(attn[name]["kernel"])
    )
    query, key, value = (project(name) for name in ("query", "key", "value"))
    slopes = [2.0 ** (-2 * (head + 1)) for head in range(4)]
    want = np.stack(
        [
            _oracle(
                query[:, head],
                key[:, head // 2],
                value[:, head // 2],
                np.exp(-slopes[head] * 1e-5),  # The highest layer's.
                8**-0.5,
            )
            for head in range(4)
        ],
        axis=1,
    )
    size = np.square(want).mean(axis=(1, 2), keepdims=True)
    want = want / np.sqrt(size + 1e-5)
    np.testing.assert_allclose(seen["head_out"][0][1], want, atol=1e-4)

  def test_decays_rise_with_heads_and_layers(self):
    config = _model()[0].config
    low, high = (
        np.asarray(lightning.Lightning().decay(config, n)) for n in (0, 1)
    )
    np.testing.assert_allclose(low[0], np.exp(-0.25 * (1 + 1e-5)), rtol=1e-6)
    self.assertTrue((np.diff(low) > 0).all() and (high > low).all())
    self.assertTrue((high <= 1).all())

  @parameterized.parameters(((12, 5, 1),), ((3, 3, 7),))
  @pytest.mark.by_default(0)
  def test_prompts_and_steps_equal_one_pass(self, lengths):
    model, params, tokens = _model()
    want = applied.logits(model, params, tokens)
    cache = full_cache.init(model.config, 3, 12)
    got = _in_steps(model, params, tokens, np.array(lengths), cache)
    for row, length in enumerate(lengths):
      chex.assert_trees_all_close(
          got[row], want[row, length - 1 :], atol=_TOLERANCE
      )

  @pytest.mark.slow
  def test_zeroed_keys_alone_fade_over_padding(self):
    """The twin: rows are not rolled. It must miss one pass."""
    model, params, tokens = _model()
    lengths = np.array([12, 5, 1])
    want = applied.logits(model, params, tokens)
    cache = full_cache.init(model.config, 3, 12)
    with mock.patch.object(jnp, "roll", lambda x, by, axis: x):
      step = applied.fresh_step()
      got = _in_steps(model, params, tokens, lengths, cache, step)
    apart = [
        float(jnp.abs(got[row] - want[row, length - 1 :]).max())
        for row, length in enumerate(lengths)
    ]
    self.assertLess(apart[0], _TOLERANCE)
    self.assertGreater(min(apart[1:]), 100 * _TOLERANCE)

  def test_padded_prompts_leave_the_states_of_each_alone(self):
    config, params, x = one_layer.draw("lightning")
    x = jnp.concatenate([x, 3 * x[:, :3]], axis=1)
    padded = one_layer.state_after(config, params, x, (9, 5))
    with mock.patch.object(jnp, "roll", lambda x, by, axis: x):
      naive = one_layer.state_after(config, params, x, (9, 5))
    for row, length in enumerate((9, 5)):
      one = x[row : row + 1, :length]
      alone = one_layer.state_after(config, params, one, (length,))[0]
      size = np.abs(alone).max()
      np.testing.assert_allclose(padded[row], alone, atol=1e-6 * size)
      # The twin zeroes keys of padding, over which the state still fades: of
      # the head that forgets soonest by tens of per cent of its size.
      of_head = lambda x: np.abs(x).max(axis=(-2, -1))
      wrong = of_head(naive[row] - alone) / of_head(alone)
      self.assertGreater(wrong.max(), 0.1)

  @pytest.mark.slow
  def test_a_second_prompt_goes_on_from_the_first(self):
    model, params, tokens = _model()
    want = applied.logits(model, params, tokens)
    cache = full_cache.init(model.config, 3, 12)
    step = jnp.broadcast_to(jnp.arange(12)[None], tokens.shape)
    apply = functools.partial(applied.step, model, params)
    _, cache = apply(tokens[:, :5], step[:, :5], cache)
    padded = jnp.where(step[:, 5:] < 10, step[:, 5:], -1)
    got, _ = apply(tokens[:, 5:], padded, cache)
    chex.assert_trees_all_close(got[:, :5], want[:, 5:10], atol=_TOLERANCE)

  @pytest.mark.slow
  def test_later_tokens_and_other_rows_do_not_matter(self):
    model, params, tokens = _model()
    changed = tokens.at[0, 6:].set((tokens[0, 6:] + 1) % 17)
    one, two = (applied.logits(model, params, t) for t in (tokens, changed))
    chex.assert_trees_all_equal(one[1:], two[1:])
    chex.assert_trees_all_close(one[0, :6], two[0, :6], atol=1e-6)
    self.assertGreater(float(jnp.abs(one[0, 6:] - two[0, 6:]).max()), 1e-3)

  @pytest.mark.slow
  def test_a_step_moves_the_same_bytes_at_every_length(self):
    model, params, _ = _model()

    def num_bytes(capacity):
      cache = full_cache.init(model.config, 2, capacity)
      step = jax.jit(
          lambda tokens, cache: model.apply(
              {"params": params}, tokens, positions=tokens, kv_cache=cache
          ),
          donate_argnums=1,
      )
      one = jax.ShapeDtypeStruct((2, 1), jnp.int32)
      compiled = step.lower(one, cache).compile()
      return compiled.cost_analysis()["bytes accessed"]

    self.assertEqual(num_bytes(64), num_bytes(65_536))

  @pytest.mark.slow
  def test_it_learns(self):
    """What comes next in a cycle of 17 tokens with one that repeats."""
    model, params, _ = _model()
    text = jnp.tile(jnp.array([1, 2, 3, 4, 1, 5, 6, 7]), 3)[None, :20]
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, state):
      def loss(params):
        logits = model.apply({"params": params}, text[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, text[:, 1:]
        ).mean()

      value, grads = jax.value_and_grad(loss)(params)
      updates, state = optimizer.update(grads, state, params)
      return optax.apply_updates(params, updates), state, value, grads

    state, losses = optimizer.init(params), []
    for _ in range(60):
      params, state, loss, grads = step(params, state)
      losses.append(float(loss))
    self.assertLess(losses[-1], 0.1 * losses[0])
    size = jnp.abs(grads["layers_0"]["attn"]["lightning"]["scale"]).max()
    self.assertGreater(float(size), 0)

  def test_what_it_cannot_follow_is_refused(self):
    model, params, tokens = _model()
    for mask in (
        masks.full(12, 12),
        masks.sliding_window(12, window=3),
        masks.document(np.array([0] * 6 + [1] * 6), is_causal=False),
        masks.hash_sparse(np.arange(12) % 2, np.arange(12) % 2),
    ):
      with self.assertRaisesRegex(errors.UserError, "no mask but the causal"):
        model.apply({"params": params}, tokens, mask=mask)
    config = dataclasses.replace(model.config, windows=(4, 4))
    with self.assertRaisesRegex(errors.UserError, "no window"):
      models.Transformer(config).apply({"params": params}, tokens)
    with self.assertRaisesRegex(errors.UserError, "nothing to evict"):
      kv_cache.init(h2o.H2O(), model.config, 3, 12)

  @pytest.mark.slow
  def test_packed_documents_are_those_alone(self):
    model, params, tokens = _model(positions="none")
    ids = np.array([[0] * 5 + [1] * 4 + [-1] * 3, [0] * 12, [3] + [4] * 11])
    found = applied.fresh_masked(model)(params, tokens, masks.document(ids))
    for row, places in enumerate(([0, 5, 9], [0, 12], [0, 1, 12])):
      for start, stop in zip(places, places[1:], strict=False):
        alone = jnp.zeros_like(tokens).at[0, : stop - start]
        alone = alone.set(tokens[row, start:stop])
        want = applied.logits(model, params, alone)[0, : stop - start]
        chex.assert_trees_all_close(
            found[row, start:stop], want, atol=_TOLERANCE
        )

  @pytest.mark.slow
  def test_a_mask_of_the_running_program_is_followed_or_gives_nan(self):
    model, params, tokens = _model(positions="none")
    ids = np.array([[0] * 5 + [1] * 4 + [-1] * 3, [0] * 12, [3] + [4] * 11])
    found = applied.fresh_masked(model)(params, tokens, masks.document(ids))
    run = applied.fresh_masked(model, is_traced=True)
    again = run(params, tokens, masks.document(jnp.asarray(ids)))
    chex.assert_trees_all_close(again, found, atol=_TOLERANCE)
    window = masks.sliding_window(12, window=jnp.asarray(3))
    self.assertTrue(np.isnan(run(params, tokens, window)).all())

  @pytest.mark.slow
  def test_a_pattern_mixes_it_with_softmax(self):
    model, params, tokens = _model("lightning", "softmax")
    self.assertNotIn("lightning", params["layers_1"]["attn"])
    want = applied.logits(model, params, tokens)
    cache = full_cache.init(model.config, 3, 12)
    lengths = np.array([4, 9, 2])
    got = _in_steps(model, params, tokens, lengths, cache)
    for row, length in enumerate(lengths):
      chex.assert_trees_all_close(
          got[row], want[row, length - 1 :], atol=_TOLERANCE
      )


class TransformersTest(absltest.TestCase):

  def test_equals_minimax(self):
    """The block alone, its sigmoid gate and a layer's slopes with it."""
    try:
      import torch
      import transformers
      from transformers.models.minimax import modeling_minimax as peer_lib
    except ImportError:
      self.skipTest("torch or transformers is not installed: the extra bench")
    peer_config = transformers.MiniMaxConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        hidden_act="silu",
        block_size=4,
        layer_types=["linear_attention"] * 3,
    )
    peer = peer_lib.MiniMaxLightningAttention(peer_config, layer_idx=1).eval()
    one_layer.random_weights(peer, torch)
    x = torch.randn(2, 9, 16)
    with torch.no_grad():
      want, want_state = peer(x, None, None)
    config = dataclasses.replace(
        one_layer.CONFIG,
        num_layers=3,
        num_kv_heads=4,
        attn_scale=1.0,
        attention=("lightning:epsilon=1e-6+gated_attention",),
    )
    vectors = one_layer.kernel(peer.qkv_proj, 16, 4, 24)["kernel"]
    query, key, value = jnp.split(vectors, 3, axis=-1)
    params = {
        "query": {"kernel": query},
        "key": {"kernel": key},
        "value": {"kernel": value},
        "out": one_layer.kernel(peer.out_proj, 4, 8, 16),
        "gated_attention": one_layer.kernel(peer.output_gate, 16, 4, 8),
        "lightning": {"scale": one_layer.array(peer.norm.weight).reshape(4, 8)},
    }
    x = one_layer.array(x)
    got, _ = one_layer.run(config, params, x, 1, "xla")
    error = float(np.abs(np.asarray(got) - want.numpy()).max())
    print(f"largest difference from transformers: {error:.1e}")
    self.assertLess(error, 1e-5)
    # And the state that a prompt leaves, whose padding is at its end.
    padded = jnp.pad(x, ((0, 0), (0, 3), (0, 0)), constant_values=7.0)
    state = one_layer.state_after(config, params, padded, (9, 9), layer=1)
    error = np.abs(state - want_state.numpy()).max()
    self.assertLess(error, 1e-6 * np.abs(state).max())


if __name__ == "__main__":
  absltest.main()
