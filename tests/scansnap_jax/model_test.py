import dataclasses

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scansnap_jax import config as config_lib
from scansnap_jax import model

# Ten times the largest float32 error seen over 12 tokens.
_ATOL = 2e-6

_RANDOM = config_lib.ModelConfig(zero_init=False)


def _batch(num_tokens=12, batch_size=5):
  counts = jax.random.poisson(jax.random.key(1), 2.0, (batch_size, num_tokens))
  query = jax.random.randint(jax.random.key(2), (batch_size,), 0, num_tokens)
  return counts.astype(jnp.float32), query


def _numpy_layer(decoder, attn_logits, counts, query, config):
  """The equations of the module docstring, token by token, in float64."""
  outputs = []
  for context, m in zip(
      np.asarray(counts, np.float64), np.asarray(query), strict=True
  ):
    one_hot = np.eye(len(context))[m]
    if config.query_in_context:
      context = context + one_hot
    tokens = np.repeat(np.arange(len(context)), context.astype(int))
    b = np.exp(np.asarray(attn_logits, np.float64)[m, tokens])
    f = np.zeros(len(context))
    np.add.at(f, tokens, b / b.sum())
    if config.normalization == "l2":
      f /= np.linalg.norm(f)
    if config.use_residual:
      f = f + one_hot
      if config.normalization == "l2":
        f /= np.linalg.norm(f)
    outputs.append(np.asarray(decoder, np.float64).T @ f)
  return np.stack(outputs)


class ReparametrizedLayerTest(parameterized.TestCase):

  @parameterized.product(
      normalization=("l2", "none"),
      use_residual=(False, True),
      query_in_context=(False, True),
  )
  def test_equals_the_equations_over_positions(self, **switches):
    config = dataclasses.replace(_RANDOM, **switches)
    layer = model.ReparametrizedLayer(12, config)
    counts, query = _batch()
    params = layer.init(jax.random.key(0), counts, query)["params"]
    params = jax.tree.map(lambda leaf: 5 * leaf, params)
    logits = layer.apply({"params": params}, counts, query)
    expected = _numpy_layer(params["Y"], params["Z"], counts, query, config)
    chex.assert_trees_all_close(
        logits, expected.astype(np.float32), atol=_ATOL, rtol=1e-5
    )

  @pytest.mark.slow
  def test_attention_is_observable_without_editing_the_module(self):
    layer = model.ReparametrizedLayer(12, _RANDOM)
    counts, query = _batch()
    params = layer.init(jax.random.key(0), counts, query)
    _, state = layer.apply(params, counts, query, mutable=["intermediates"])
    (attn_logits,) = state["intermediates"]["attn_logits"]
    (attn_weights,) = state["intermediates"]["attn_weights"]
    chex.assert_trees_all_equal(attn_logits, params["params"]["Z"][query])
    np.testing.assert_allclose(attn_weights.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(attn_weights[counts == 0], 0)

  def test_query_does_not_attend_to_itself_unless_asked(self):
    counts, query = _batch()
    counts = counts.at[jnp.arange(5), query].set(0)
    for in_context in (False, True):
      config = dataclasses.replace(_RANDOM, query_in_context=in_context)
      layer = model.ReparametrizedLayer(12, config)
      params = layer.init(jax.random.key(0), counts, query)
      _, state = layer.apply(params, counts, query, mutable=["intermediates"])
      (attn_weights,) = state["intermediates"]["attn_weights"]
      own = attn_weights[jnp.arange(5), query]
      np.testing.assert_array_equal(own > 0, in_context)

  @pytest.mark.slow
  def test_empty_context_has_finite_value_and_gradient(self):
    layer = model.ReparametrizedLayer(12, _RANDOM)
    counts, query = jnp.zeros((2, 12)), jnp.array([0, 1])
    params = layer.init(jax.random.key(0), counts, query)
    loss = lambda params: (layer.apply(params, counts, query) ** 2).sum()
    value, grads = jax.value_and_grad(loss)(params)
    self.assertEqual(value, 0)
    chex.assert_trees_all_equal(grads, jax.tree.map(jnp.zeros_like, params))

  def test_logits_of_1e4_neither_overflow_nor_leak_to_absent_tokens(self):
    layer = model.ReparametrizedLayer(3)
    attn_logits = jnp.array([[1e4, -1e4, 9e3]] * 3)
    params = {"params": {"Y": jnp.eye(3), "Z": attn_logits}}
    counts = jnp.array([[0.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    logits = layer.apply(params, counts, jnp.array([0, 0]))
    np.testing.assert_array_equal(logits, [[0, 1, 0], [1, 0, 0]])

  @pytest.mark.slow
  def test_uniform_start_has_the_width_of_a_linear_layer(self):
    layer = model.ReparametrizedLayer(100, _RANDOM)
    params = layer.init(
        jax.random.key(0), jnp.ones((1, 100)), jnp.zeros(1, int)
    )
    for leaf in jax.tree.leaves(params):
      self.assertLessEqual(float(jnp.abs(leaf).max()), 0.1)
      # 10,000 entries: the deviation of a uniform's is known to 0.5 %.
      np.testing.assert_allclose(leaf.std(), 0.1 / 3**0.5, rtol=0.03)


class OriginalLayerTest(parameterized.TestCase):

  @parameterized.product(use_residual=(False, True), embed_dim=(4, 16))
  @pytest.mark.by_default(0)
  def test_equals_its_reparametrization(self, use_residual, embed_dim):
    config = dataclasses.replace(
        _RANDOM, use_residual=use_residual, embed_dim=embed_dim
    )
    counts, query = _batch()
    layer = model.OriginalLayer(12, config)
    params = layer.init(jax.random.key(0), counts, query)["params"]
    params = jax.tree.map(lambda leaf: 2 * leaf, params)
    reparametrized = model.ReparametrizedLayer(12, config)
    chex.assert_trees_all_close(
        layer.apply({"params": params}, counts, query),
        reparametrized.apply(
            {"params": model.reparametrize(params)}, counts, query
        ),
        atol=1e-5,
    )

  def test_the_map_leaves_y_and_z_alone(self):
    params = {"Y": jnp.eye(2), "Z": jnp.ones((2, 2))}
    chex.assert_trees_all_equal(model.reparametrize(params), params)


if __name__ == "__main__":
  absltest.main()
