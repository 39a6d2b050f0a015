"""Convolutions beside a loop, their state, and what their twin gets wrong."""

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.systems.score_rules import convolved
from joma.transformer import config as configs
from joma.transformer import full_cache
from joma.transformer import layer_hooks
from joma.transformer import model as models
from tests.joma.transformer import applied

_TOLERANCE = 1e-6


def _by_hand(x, kernel):
  """One sequence: a loop over places and taps."""
  out = np.zeros_like(x)
  for t in range(len(x)):
    for u in range(len(kernel)):
      if t - u >= 0:
        out[t] += kernel[u] * x[t - u]
  return out


class ConvolvedTest(parameterized.TestCase):

  @parameterized.parameters(False, True)
  def test_it_is_the_loop(self, shared):
    draw = np.random.default_rng(0).normal
    x = draw(size=(2, 6, 3, 4)).astype(np.float32)
    kernel = draw(size=(3, 1 if shared else 3, 4)).astype(np.float32)
    padded = jnp.pad(jnp.asarray(x), ((0, 0), (2, 0), (0, 0), (0, 0)))
    got = convolved.convolve(padded, jnp.asarray(kernel), 6)
    want = np.stack([_by_hand(row, kernel) for row in x])
    np.testing.assert_allclose(got, want, atol=_TOLERANCE)
    # The twin turns the kernel round: a token would see itself last.
    turned = np.stack([_by_hand(row, kernel[::-1]) for row in x])
    self.assertGreater(np.abs(got - turned).max(), 0.1)

  def test_what_is_kept_are_the_newest_tokens_not_padding(self):
    x = jnp.arange(7.0)[None, :, None, None] * jnp.ones((3, 7, 1, 1))
    # Two old inputs, 0 and 1, then five places, some of padding.
    got = convolved.last_inputs(x, jnp.array([5, 2, 0]), 2)[..., 0, 0]
    np.testing.assert_array_equal(got, [[5, 6], [2, 3], [0, 1]])

  @pytest.mark.slow
  def test_it_sees_as_far_as_it_is_wide(self):
    """Of the third token, keys of the first three and no others change."""
    config = configs.TransformerConfig(
        vocab_size=11, num_layers=1, embed_dim=16, num_heads=4, num_kv_heads=2,
        head_dim=8, hidden_dim=16, attention=("convolved:start=1.0",),
        positions="none", windows=(1,),
    )  # fmt: skip
    model = models.Transformer(config, implementation="reference")
    tokens = jax.random.randint(jax.random.key(1), (1, 8), 0, 11)
    params = applied.params(model)
    one = applied.logits(model, params, tokens)
    two = applied.logits(model, params, tokens.at[0, 2].set(tokens[0, 2] ^ 1))
    differs = np.asarray(jnp.abs(one - two)[0].max(axis=-1) > 0)
    np.testing.assert_array_equal(np.flatnonzero(differs), [2, 3, 4])

  def test_a_step_keeps_w_minus_one_inputs(self):
    config = configs.TransformerConfig(attention=("convolved:width=5",))
    cache, *_ = full_cache.init(config, 2, 16)
    assert isinstance(cache, layer_hooks.PreparedCache)
    chex.assert_shape(cache.state["convolved"]["query"], (2, 4, 4, 32))

  @pytest.mark.slow
  def test_goes_with_another_that_prepares(self):
    """In the order of the entry, in a pass and in steps with both states."""
    found, tokens = {}, jax.random.randint(jax.random.key(1), (2, 6), 0, 11)
    for entry in ("convolved", "ssa:width=0+convolved"):
      config = configs.TransformerConfig(
          vocab_size=11, num_layers=1, embed_dim=16, num_heads=4,
          num_kv_heads=2, head_dim=8, hidden_dim=16, attention=(entry,),
      )  # fmt: skip
      model = models.Transformer(config, implementation="reference")
      params = applied.params(model)
      found[entry] = whole = applied.logits(model, params, tokens)
      cache = full_cache.init(config, 2, 8)
      for t in range(6):
        places = jnp.full((2, 1), t)
        step, cache = applied.step(
            model, params, tokens[:, t : t + 1], places, cache
        )
        np.testing.assert_allclose(step[:, 0], whole[:, t], atol=1e-5)
    one, both = found.values()
    self.assertGreater(float(jnp.abs(one - both).max()), 1e-3)


if __name__ == "__main__":
  absltest.main()
