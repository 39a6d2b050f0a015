"""Tests of what is read off a Transformer."""

import functools
import math

from absl.testing import absltest
from absl.testing import parameterized
import chex
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.transformer import config as configs
from joma.transformer import model as models
from joma.transformer import probes
from tests.joma.transformer import applied

# Ten times the rounding of float32 sums over 64 keys.
_ATOL = 1e-5
# The same for logits of size 10, computed in another order.
_LOGITS_ATOL = 1e-4


_top_mass = jax.jit(probes.top_mass)


def _tiny_model(**changes):
  settings = dict(
      vocab_size=11,
      num_layers=2,
      embed_dim=16,
      num_heads=4,
      num_kv_heads=2,
      head_dim=4,
      hidden_dim=24,
      max_len=16,
  )
  return models.Transformer(configs.TransformerConfig(**(settings | changes)))


def _tiny(**changes):
  model = _tiny_model(**changes)
  tokens = jax.random.randint(jax.random.key(1), (3, 9), 0, 11)
  params = applied.params(model)
  # Sharper than at the start, so that heads differ.
  return model, jax.tree.map(lambda leaf: 2 * leaf, params), tokens


class AttentionTest(parameterized.TestCase):

  @pytest.mark.slow
  def test_weights_without_row_sums_are_measured_by_their_shares(self):
    """Else the effective support of many small weights is infinite."""
    model, params, tokens = _tiny(attention=("pointwise:form=identity",))
    apply = jax.jit(functools.partial(model.apply, mutable="intermediates"))
    _, seen = apply({"params": params}, tokens)
    made = seen["intermediates"]["layers_1"]["attn"]["attn_weights"][0]
    found = probes.weights_of(seen, 1, model.config, tokens.shape)
    size = np.abs(np.asarray(made))
    want = size / size.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(found, want, atol=1e-6)
    self.assertGreater(np.abs(size - want).max(), 1e-3)

  def test_measures_derived_by_hand(self):
    # Query 0 sees one key, query 3 four, of which ceil(.8) = 1 is the top.
    attn_weights = np.zeros((1, 1, 4, 5), np.float32)
    attn_weights[0, 0, 0] = [1, 0, 0, 0, 0]
    attn_weights[0, 0, 1] = [0.5, 0.5, 0, 0, 0]
    attn_weights[0, 0, 2] = [0, 0, 1, 0, 0]
    attn_weights[0, 0, 3] = [0.25, 0.002, 0.748, 0, 0]
    found = probes.attention(jnp.array(attn_weights), probes.count_visible(4))
    last = -sum(a * math.log(a) for a in (0.25, 0.002, 0.748))
    expected = probes.Attention(
        entropy=[0, math.log(2), 0, last],
        effective_support=[1, 2, 1, math.exp(last)],
        top_mass=[1, 0.5, 1, 0.748],
        # Of three keys two are 0; of four one is 0 and one below .00748.
        negligible=[0, 0, 2 / 3, 2 / 4],
        sink_mass=[1, 0.5, 0, 0.25],
    )
    for name in expected._fields:
      np.testing.assert_allclose(
          getattr(found, name)[0, 0],
          getattr(expected, name),
          atol=_ATOL,
          err_msg=name,
      )

  @parameterized.parameters(None, 3)
  @pytest.mark.slow
  def test_uniform_attention_measures_what_uniform_says(self, window):
    num_visible = probes.count_visible(8, window)
    keys = np.arange(8)
    mask = keys[None] <= keys[:, None]
    if window is not None:
      mask &= keys[None] > keys[:, None] - window
    np.testing.assert_array_equal(num_visible, mask.sum(axis=1))
    weights = jnp.array(mask / mask.sum(axis=1, keepdims=True))
    found = probes.attention(weights[None, None], num_visible)
    expected = probes.uniform(num_visible)
    for name in found._fields:
      if name != "sink_mass" or window is None:
        np.testing.assert_allclose(
            getattr(found, name)[0, 0], getattr(expected, name), atol=_ATOL
        )

  @hypothesis.settings(derandomize=True, deadline=None, max_examples=50)
  @hypothesis.given(
      rows=st.lists(
          st.lists(
              st.sampled_from([0.0, 1e-30, 0.25, 0.5, 1.0, 3.0])
              | st.floats(0, 1, width=32),
              min_size=7,
              max_size=7,
          ),
          min_size=2,
          max_size=2,
      ),
      num_top=st.lists(st.integers(1, 7), min_size=2, max_size=2),
  )
  @pytest.mark.slow
  def test_top_mass_sums_the_largest_whatever_the_ties(self, rows, num_top):
    values = np.array(rows, np.float32)
    values[values < np.finfo(np.float32).tiny] = 0  # Flushed on CPUs.
    found = _top_mass(jnp.array(values), jnp.array(num_top))
    ordered = -np.sort(-values.astype(np.float64), axis=-1)
    expected = [
        row[:num].sum() for row, num in zip(ordered, num_top, strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


class ReadTest(absltest.TestCase):

  @pytest.mark.slow
  def test_sums_are_those_of_the_sown_weights(self):
    model, params, tokens = _tiny(windows=(3, 0))
    lengths = jnp.array([9, 4, 0])
    reading = probes.read(model, params, tokens, lengths, with_logits=True)
    self.assertEqual(reading.num_tokens, 13)
    self.assertEqual(reading.num_targets, 8 + 3)
    apply = functools.partial(model.apply, mutable="intermediates")
    logits, seen = jax.jit(apply)({"params": params}, tokens)
    for row, length in enumerate((9, 4)):
      chex.assert_trees_all_close(
          reading.logits[row, :length], logits[row, :length], atol=_LOGITS_ATOL
      )
    for layer in range(2):
      sown = seen["intermediates"][f"layers_{layer}"]["attn"]
      weights = np.asarray(sown["attn_weights"][0], np.float64)
      rows = [weights[0], weights[1, :, :4]]
      entropy = sum(
          -(a * np.log(np.where(a > 0, a, 1))).sum(axis=(-1, -2)) for a in rows
      )
      sink = sum(a[..., 0].sum(axis=-1) for a in rows)
      np.testing.assert_allclose(
          reading.attention.entropy[layer], entropy, rtol=_ATOL
      )
      np.testing.assert_allclose(
          reading.attention.sink_mass[layer], sink, rtol=_ATOL
      )
    log_probs = np.asarray(jax.nn.log_softmax(logits), np.float64)
    expected = -sum(
        log_probs[row, t, tokens[row, t + 1]]
        for row, length in enumerate((9, 4))
        for t in range(length - 1)
    )
    np.testing.assert_allclose(reading.loss, expected, rtol=_ATOL)

  @pytest.mark.slow
  def test_maps_of_all_layers_are_never_held_at_once(self):
    sizes = []
    tokens = jax.ShapeDtypeStruct((1, 128), jnp.int32)
    for num_layers in (2, 4):
      model = _tiny_model(num_layers=num_layers)
      params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
      lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
      compiled = probes.read.lower(model, params, tokens, lengths).compile()
      sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    one_map = 4 * 128 * 128 * 4
    self.assertLess(sizes[1] - sizes[0], one_map)


class SinkRateTest(absltest.TestCase):

  def test_heads_above_the_threshold_are_counted(self):
    mass = np.array([[0.1, 0.31, 0.9, 0.29], [0.0, 0.0, 0.0, 1.0]])
    np.testing.assert_array_equal(probes.sink_rate(mass), [0.5, 0.25])


class StableRanksTest(absltest.TestCase):

  @pytest.mark.slow
  def test_ranks_are_those_of_the_singular_values(self):
    _, params, _ = _tiny()
    found = probes.stable_ranks(params)
    self.assertEqual(sorted(found), ["down", "gate", "up"])
    for name, ranks in found.items():
      for layer, rank in enumerate(ranks):
        kernel = np.asarray(params[f"layers_{layer}"]["mlp"][name]["kernel"])
        values = np.linalg.svd(kernel.astype(np.float64), compute_uv=False)
        expected = (values**2).sum() / values[0] ** 2
        self.assertAlmostEqual(rank, expected, delta=1e-4 * expected)


if __name__ == "__main__":
  absltest.main()
