"""Networks that learn KVzip's scores: their data, their loss, their fit."""

from absl.testing import absltest
import jax.numpy as jnp
import numpy as np

from joma.systems.cache_policies.by_attention import kvzap
from joma.systems.profiles import kvzip_surrogate
from joma.transformer import config as configs
from joma.transformer import model as models
from scansnap_jax.experiment import errors
from tests.joma.transformer import applied

_CONFIG = configs.TransformerConfig(
    vocab_size=12,
    num_layers=2,
    embed_dim=8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    hidden_dim=8,
    max_len=32,
)
_REQUEST = (10, 11)


class SeeTest(absltest.TestCase):

  def test_scores_are_the_greatest_weights_from_behind_the_text(self):
    """By the weights that the model sows of text, request and text again."""
    model = models.Transformer(_CONFIG, implementation="reference")
    params = applied.params(model)
    texts = np.array([[1, 2, 3, 4, 5], [5, 7, 2, 0, 1], [3, 3, 1, 6, 2]])
    seen = kvzip_surrogate.see(model, params, texts, _REQUEST, batch_size=2)
    whole = np.concatenate(
        [texts, np.tile(_REQUEST, (3, 1)), texts], axis=1
    ).astype(np.int32)
    _, made = model.apply(
        {"params": params}, jnp.asarray(whole), mutable="intermediates"
    )
    for layer in range(2):
      sown = made["intermediates"][f"layers_{layer}"]
      weights = np.asarray(sown["attn"]["attn_weights"][0])  # B N T T
      for b in range(3):
        for head in range(2):
          mine = weights[b, 2 * head : 2 * head + 2, 5:, :5]
          want = mine.max(axis=(0, 1))
          got = seen.score[layer, 5 * b : 5 * b + 5, head]
          np.testing.assert_allclose(got, want, rtol=1e-5)
    self.assertEqual(seen.x.shape, (2, 15, 8))
    # Inputs are normalized: of the first layer those of equal tokens are equal.
    same = [seen.x[0, i] for i in (2, 10, 11)]  # Token 3, wherever it stands.
    np.testing.assert_allclose(same[1], same[0], atol=1e-6)
    np.testing.assert_allclose(same[2], same[0], atol=1e-6)

  def test_texts_that_cannot_be_read_twice_are_named(self):
    model = models.Transformer(_CONFIG, implementation="reference")
    with self.assertRaisesRegex(errors.UserError, "read twice, 34 tokens"):
      kvzip_surrogate.see(model, {}, np.zeros((1, 16), int), _REQUEST)


class FitTest(absltest.TestCase):

  def _planted(self, num_rows, seed):
    draws = np.random.default_rng(seed)
    x = draws.standard_normal((2, num_rows, 6), np.float32) * 3 + 1
    along = np.random.default_rng(7).standard_normal((2, 6, 2))
    log = -4 + 0.3 * np.tanh(np.einsum("LRD,LDK->LRK", x, along))
    return kvzip_surrogate.Seen(x, np.exp(log).astype(np.float32))

  def test_finds_what_was_planted_on_rows_it_never_saw(self):
    settings = kvzip_surrogate.Settings(size=8, num_steps=400, batch=64)
    networks, losses = kvzip_surrogate.fit(self._planted(800, 0), settings)
    self.assertLess(losses[-20:].mean(), 0.3 * losses[:20].mean())
    found = kvzip_surrogate.correlation(networks, self._planted(200, 1))
    self.assertGreater(found.min(), 0.8)
    # The other head's and the other layer's are none of it.
    crossed = networks._replace(
        outer=networks.outer[..., ::-1],
        outer_bias=networks.outer_bias[..., ::-1],
    )
    other = kvzip_surrogate.correlation(crossed, self._planted(200, 1))
    self.assertLess(other.max(), 0.8)

  def test_correlation_is_numpys(self):
    draws = np.random.default_rng(3)
    network = kvzap.Network(
        draws.standard_normal((1, 3, 2), np.float32),
        np.zeros((1, 2), np.float32),
        draws.standard_normal((1, 2, 1), np.float32),
        np.zeros((1, 1), np.float32),
    )
    x = draws.standard_normal((1, 9, 3), np.float32)
    score = np.exp(-draws.random((1, 9, 1)) * 20).astype(np.float32)
    seen = kvzip_surrogate.Seen(x, score)
    one = kvzap.Network(*(part[0] for part in network))
    said = np.asarray(kvzap.log_scores(one, jnp.asarray(x[0])))[:, 0]
    want = np.corrcoef(said, np.log(np.maximum(score[0, :, 0], 1e-6)))[0, 1]
    got = kvzip_surrogate.correlation(network, seen)
    np.testing.assert_allclose(got, [[want]], rtol=1e-4)


if __name__ == "__main__":
  absltest.main()
