"""Overlaps of planted choices, and a profile of a small model."""

from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.systems.profiles import layer_overlap
from joma.systems.profiles import layer_shares
from joma.transformer import config as configs
from joma.transformer import model as models
from tests.joma.transformer import applied


class LayerOverlapTest(absltest.TestCase):

  def test_overlaps_of_planted_choices(self):
    """Of one head {0, 1}, {0, 1} and {0, 2, 3}; the other has all."""
    chosen = np.zeros((3, 1, 2, 5, 4), bool)
    for layer, blocks in enumerate(((0, 1), (0, 1), (0, 2, 3))):
      chosen[layer, :, 0, :, blocks] = True
    chosen[:, :, 1] = True
    found = np.asarray(layer_shares.overlaps(jnp.asarray(chosen)))
    third, half = 1 / 3, 0.5
    want = [[1, 1, third], [1, 1, third], [half, half, 1]]
    np.testing.assert_allclose(found[..., 0], want, atol=1e-6)
    np.testing.assert_allclose(found[..., 1], 1, atol=1e-6)

  @pytest.mark.slow
  def test_a_choice_of_everything_is_shared_and_costs_nothing(self):
    config = configs.TransformerConfig(
        vocab_size=11,
        num_layers=2,
        embed_dim=16,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        hidden_dim=8,
        embed_scale=4.0,
    )
    model = models.Transformer(config, implementation="reference")
    tokens = jax.random.randint(jax.random.key(1), (2, 16), 0, 11)
    params = applied.params(model)
    found = layer_overlap.measure(model, params, tokens, 2, 8)
    np.testing.assert_allclose(found.overlap, 1, atol=1e-6)
    np.testing.assert_allclose(found.error, 0, atol=1e-6)
    found = layer_overlap.measure(model, params, tokens, 2, 3, 8)
    self.assertTrue((found.least_overlap <= found.overlap + 1e-6).all())
    np.testing.assert_allclose(jnp.diagonal(found.overlap), 1, atol=1e-6)
    self.assertBetween(float(found.overlap[0, 1]), 0.5, 0.99)
    self.assertGreater(float(found.error.min()), 0.01)
    self.assertLess(float(found.share.max()), 1)


if __name__ == "__main__":
  absltest.main()
