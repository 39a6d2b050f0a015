"""Pooling beside plain NumPy, and that padding and other texts say nothing."""

import math

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np

from joma.systems.readouts import pooling
from tests import draws

_LENGTHS = (5, 2, 7)
_MODULE = pooling.LatentPooling(
    num_latents=3, num_heads=2, hidden_dim=6, has_layers=True
)


def _plain(design, resid, length):
  """Of one text, by loops over its tokens."""
  last = [resid[-1, t] for t in range(length)]
  found = last[-1] if design == "eos" else sum(last) / length
  return found / math.sqrt(sum(found * found))


def _norm(x):
  x = x - x.mean(axis=-1, keepdims=True)
  return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6)


def _gelu(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _plain_latents(params, states):
  """The module's equations for the states [S, D] of one text."""
  p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
  keys = _norm(states + p["layer_embed"])
  dense = lambda name, x: x @ p[name]["kernel"] + p[name]["bias"]
  attn = lambda name, x, h: (
      x @ p["attn"][name]["kernel"][:, h] + p["attn"][name]["bias"][h]
  )
  x = p["latents"].copy()
  for h in range(2):
    query, key = attn("query", _norm(p["latents"]), h), attn("key", keys, h)
    weights = np.exp(query @ key.T / np.sqrt(query.shape[-1]))
    weights /= weights.sum(axis=-1, keepdims=True)
    x += weights @ attn("value", keys, h) @ p["attn"]["out"]["kernel"][h]
  x += p["attn"]["out"]["bias"]
  hidden = _norm(x)
  x = x + dense("down", _gelu(dense("gate", hidden)) * dense("up", hidden))
  found = x.mean(axis=0)
  return found / np.linalg.norm(found)


def _params(states):
  """Numbers everywhere, biases too; scales of norms are 1."""
  shapes = jax.eval_shape(
      _MODULE.init, jax.random.key(0), states, jnp.ones(states.shape[:2], bool)
  )["params"]
  draw = np.random.default_rng(1)
  return jax.tree_util.tree_map_with_path(
      lambda path, leaf: (
          np.float32(draw.normal(0, 0.4, leaf.shape))
          if "norm" not in path[0].key
          else np.full(leaf.shape, float(path[-1].key == "scale"), np.float32)
      ),
      shapes,
  )


class PoolTest(parameterized.TestCase):

  @parameterized.parameters("mean", "eos")
  def test_is_that_of_the_tokens_alone(self, design):
    resid = draws.normal(0, 3, 4, 7, 6)
    lengths = jnp.array(_LENGTHS)
    found = pooling.pool(design, resid, lengths)
    for row, length in enumerate(_LENGTHS):
      expected = _plain(design, np.float64(resid[row]), length)
      np.testing.assert_allclose(found[row], expected, atol=1e-6)
    # What lies behind a text is not read.
    is_token = pooling.token_mask(7, lengths)[:, None, :, None]
    other = jnp.where(is_token, resid, 1e6)
    chex.assert_trees_all_equal(found, pooling.pool(design, other, lengths))

  def test_a_text_of_zeros_has_a_vector_and_a_gradient(self):
    zeros = jnp.zeros((1, 2, 3, 4))
    loss = lambda x: pooling.pool("mean", x, jnp.array([3])).sum()
    self.assertTrue(np.isfinite(jax.grad(loss)(zeros)).all())
    np.testing.assert_array_equal(
        pooling.pool("eos", zeros, jnp.array([3])), np.zeros((1, 4))
    )

  def test_an_unknown_design_is_refused(self):
    with self.assertRaisesRegex(ValueError, "got 'max'"):
      pooling.pool("max", jnp.zeros((1, 1, 1, 1)), jnp.array([1]))


class LatentPoolingTest(absltest.TestCase):

  def test_is_that_of_the_equations(self):
    states = draws.normal(0, 3, 4, 6)
    params = _params(states)
    run = jax.jit(_MODULE.apply)
    found = run({"params": params}, states, jnp.ones((3, 4), bool))
    for row in range(3):
      expected = _plain_latents(params, np.float64(states[row]))
      np.testing.assert_allclose(found[row], expected, atol=1e-5)
    # A state that is none is not read, and its neighbours do not matter.
    is_state = jnp.ones((3, 4), bool).at[1, 3].set(False)
    changed = states.at[1, 3].set(50.0)
    one, two = (run({"params": params}, x, is_state) for x in (states, changed))
    chex.assert_trees_all_equal(one, two)
    chex.assert_trees_all_equal(one[0], found[0])
    self.assertGreater(np.abs(one[1] - found[1]).max(), 1e-3)


if __name__ == "__main__":
  absltest.main()
