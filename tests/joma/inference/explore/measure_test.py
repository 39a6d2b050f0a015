from absl.testing import absltest
import jax.numpy as jnp
import numpy as np

from joma.inference.explore import measure
from joma.transformer import config as configs
from joma.transformer import model as models
from joma.transformer import probes
from tests.joma.transformer import applied


class MeasureTest(absltest.TestCase):

  def test_prefix_matching_reads_behind_the_earlier_occurrence(self):
    shape = configs.TransformerConfig(
        vocab_size=5,
        num_layers=1,
        embed_dim=8,
        num_heads=2,
        num_kv_heads=2,
        head_dim=4,
        hidden_dim=8,
        max_len=9,
        positions="learned",
    )
    model = models.Transformer(shape)
    params = applied.params(model)
    found = measure.prefix_matching(model, params)
    # As many as fit: four tokens, twice.
    rng = np.random.default_rng(0)
    once = np.stack([rng.choice(5, 4, replace=False) for _ in range(4)])
    twice = np.concatenate([once, once], axis=1)
    _, seen = model.apply(
        {"params": params}, jnp.asarray(twice), mutable="intermediates"
    )
    maps = np.asarray(probes.weights_of(seen, 0, shape, twice.shape))
    total = np.zeros(2)
    for text in range(4):
      for query in range(4, 8):
        earlier = twice[text, :query].tolist().index(twice[text, query])
        total += maps[text, :, query, earlier + 1]
    np.testing.assert_allclose(found, total[None] / 16, atol=1e-5)

  def test_a_text_of_several_windows_sizes_has_its_own_keys_alone(self):
    shape = configs.TransformerConfig(
        vocab_size=5,
        num_layers=1,
        embed_dim=4,
        num_heads=1,
        num_kv_heads=1,
        head_dim=4,
        hidden_dim=4,
        max_len=300,
    )
    model = models.Transformer(shape)
    ids = np.arange(9, dtype=np.int32) % 5
    attention, losses = measure.attention(model, applied.params(model), ids)
    self.assertEqual(attention.keys.shape, (1, 1, 9, 9))
    self.assertLess(attention.keys.max(), 9)
    np.testing.assert_allclose(attention.totals, 1, atol=1e-5)
    self.assertTrue(np.isfinite(losses[:-1]).all())


if __name__ == "__main__":
  absltest.main()
