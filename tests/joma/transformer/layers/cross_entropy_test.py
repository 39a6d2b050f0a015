import functools

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.transformer import config as configs
from joma.transformer import model as models
from joma.transformer.layers import cross_entropy


class TokenLossesTest(absltest.TestCase):

  def test_value_and_gradient_are_those_of_the_definition(self):
    keys = jax.random.split(jax.random.key(0), 3)
    logits = 5 * jax.random.normal(keys[0], (2, 3, 7))
    targets = jax.random.randint(keys[1], (2, 3), 0, 7)
    cotangents = jax.random.normal(keys[2], (2, 3))

    def defined(logits):
      log_probs = jax.nn.log_softmax(logits)
      return -(log_probs * jax.nn.one_hot(targets, 7)).sum(axis=-1)

    expected, pull = jax.vjp(defined, logits)
    found, ours = jax.vjp(
        lambda x: cross_entropy.token_losses(x, targets), logits
    )
    # A few roundings of numbers up to 20.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        ours(cotangents)[0], pull(cotangents)[0], rtol=1e-5, atol=1e-6
    )


class PiecesTest(parameterized.TestCase):

  @parameterized.parameters((5, 1), (12, 1), (100, 1), (4, 2), (8, 4), (1, 4))
  def test_come_together_again(self, size, num_parts):
    x = jnp.arange(2 * 12 * 3).reshape(2, 12, 3)
    pieces = cross_entropy.into_pieces(x, size, num_parts)
    found = cross_entropy.out_of_pieces(pieces, 12, num_parts)
    np.testing.assert_array_equal(found, x)

  def test_hold_as_much_of_every_part(self):
    pieces = cross_entropy.into_pieces(jnp.arange(12)[None], 4, 2)
    want = [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    np.testing.assert_array_equal(pieces[:, 0], want)


class ModelTest(parameterized.TestCase):

  @parameterized.product(tie=(True, False), piece=(3, 7))
  @pytest.mark.by_default(1)
  def test_losses_in_pieces_are_those_at_once(self, tie, piece):
    config = configs.TransformerConfig(
        vocab_size=31,
        num_layers=1,
        embed_dim=8,
        num_heads=2,
        num_kv_heads=2,
        head_dim=4,
        hidden_dim=16,
        max_len=10,
        tie_embeddings=tie,
    )
    tokens, targets = jax.random.randint(jax.random.key(0), (2, 2, 10), 0, 31)
    model = models.Transformer(config, implementation="reference")
    params = jax.jit(model.init)(jax.random.key(1), tokens)["params"]
    weights = jax.random.normal(jax.random.key(2), (2, 10))

    def sum_of(model, params):
      losses = model.apply({"params": params}, tokens, targets=targets)
      return (weights * losses).sum()

    def defined(params):
      logits = model.apply({"params": params}, tokens)
      log_probs = jax.nn.log_softmax(logits)
      picked = jnp.take_along_axis(log_probs, targets[..., None], axis=2)
      return -(weights * picked[..., 0]).sum()

    want = jax.jit(jax.value_and_grad(defined))(params)
    for one in (model, model.clone(loss_piece=piece)):
      loss = functools.partial(sum_of, one)
      found = jax.jit(jax.value_and_grad(loss))(params)
      chex.assert_trees_all_close(found, want, rtol=1e-4, atol=1e-5)

  def test_pieces_hold_less(self):
    # Of logits [1, 256, 4096] in float32, 4.2 MB, a step has no whole array.
    config = configs.TransformerConfig(
        vocab_size=4096,
        num_layers=1,
        embed_dim=8,
        num_heads=2,
        num_kv_heads=2,
        head_dim=4,
        hidden_dim=16,
        max_len=256,
    )
    tokens = jnp.zeros((1, 256), jnp.int32)
    model = models.Transformer(config, implementation="xla")
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]

    def held(piece):
      loss = lambda params: (
          model.clone(loss_piece=piece)
          .apply({"params": params}, tokens, targets=tokens)
          .sum()
      )
      compiled = jax.jit(jax.grad(loss)).lower(params).compile()
      return compiled.memory_analysis().temp_size_in_bytes

    self.assertGreater(held(None), 256 * 4096 * 4)
    self.assertLess(held(32), 256 * 4096 * 4 // 2)


if __name__ == "__main__":
  absltest.main()
