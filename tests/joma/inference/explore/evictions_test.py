import dataclasses

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.inference.evaluation import evaluate
from joma.inference.explore import evictions
from joma.inference.explore import explore
from joma.inference.explore import explore_config
from joma.inference.explore import measure
from joma.inference.explore import view
from joma.transformer import config as configs
from joma.transformer import model as models
from joma.transformer import probes
from scansnap_jax.experiment import errors
from tests.joma.transformer import applied

_SHAPE = configs.TransformerConfig(
    vocab_size=11,
    num_layers=2,
    embed_dim=8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    hidden_dim=8,
    max_len=32,
)
_MODEL = models.Transformer(_SHAPE)
_IDS = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3], np.int32)
_SLOTS = 5


class EvictionsTest(parameterized.TestCase):

  @parameterized.parameters("h2o", "streaming_llm:num_sinks=1")
  @pytest.mark.by_default(0)
  def test_kept_masks_are_the_caches_own_after_every_token(self, name):
    params = applied.params(_MODEL)
    found = evictions.record(_MODEL, params, _IDS, name, _SLOTS)
    caches = evictions.caches_of(_MODEL, name, _SLOTS, len(_IDS))
    apply = jax.jit(_MODEL.apply)
    for query, token in enumerate(_IDS):
      at = np.array([[query]])
      logits, caches = apply(
          {"params": params}, token[None, None], positions=at, kv_cache=caches
      )
      if query + 1 < len(_IDS):
        loss = -jax.nn.log_softmax(logits[0, 0])[_IDS[query + 1]]
        self.assertAlmostEqual(found.losses[query], float(loss), places=4)
      for layer, cache in enumerate(caches):
        for head, positions in enumerate(cache.kept_positions()[0].tolist()):
          kept = np.flatnonzero(found.is_kept(layer, head, query)).tolist()
          self.assertEqual(kept, sorted(p for p in positions if p >= 0))
    self.assertEqual(found.is_kept(1, 1, 15).sum(), _SLOTS)
    self.assertTrue(np.isnan(found.losses[-1]))

  @parameterized.parameters("softmax", "convolved")
  @pytest.mark.slow
  def test_a_window_by_hand_after_a_prompt(self, system):
    """What a system keeps beside a cache hides none of its tokens."""
    shape = dataclasses.replace(_SHAPE, attention=(system,))
    model = models.Transformer(shape)
    params = applied.params(model)
    found = evictions.record(model, params, _IDS, "window", _SLOTS, 10)
    # Query 10 sees the last five, itself among them.
    expected = [10] * 6 + [11, 12, 13, 14, 15] + [16] * 5
    expected = np.broadcast_to(expected, (2, 2, 16))
    np.testing.assert_array_equal(found.left_at, expected)
    full = evictions.record(model, params, _IDS, "full", 16, 10)
    self.assertTrue((full.left_at == 16).all())

  @pytest.mark.slow
  def test_what_a_policy_still_has_of_attention(self):
    params = applied.params(_MODEL)
    config = explore_config.ExploreConfig(
        policies=("h2o",), slots=_SLOTS, reading="tokens", max_new_tokens=0
    )
    found = explore.read(_MODEL, params, _IDS, config, name="tiny")
    _, seen = _MODEL.apply(
        {"params": params}, jnp.asarray(_IDS)[None], mutable="intermediates"
    )
    for layer in range(2):
      maps = probes.weights_of(seen, layer, _SHAPE, (1, 16))[0]
      for head in range(4):
        one = np.asarray(maps[head])
        np.testing.assert_allclose(
            found.attention.of_head(layer, head), one, atol=1e-5
        )
        share = [
            one[query][found.policies[0].is_kept(layer, head // 2, query)].sum()
            for query in range(16)
        ]
        np.testing.assert_allclose(
            found.attention.shares[0, layer, head], share, atol=1e-5
        )
        np.testing.assert_allclose(
            found.attention.received[layer, head], one.sum(0), atol=1e-5
        )
        entropy = -(one * np.log(np.maximum(one, 1e-30))).sum() / 16
        self.assertAlmostEqual(
            found.attention.entropy[layer, head], entropy, places=4
        )
    self.assertRegex(view.finding(found), "^With 5 slots H2O keeps ")
    self.assertEqual(found.pieces[1], " 1")

  def test_what_cannot_be_is_one_sentence(self):
    config = explore_config.ExploreConfig(reading="tokens")
    mixed = dataclasses.replace(_SHAPE, attention=("lightning",))
    for call, message in (
        (
            lambda: evictions.caches_of(_MODEL, "h2o:num_recent=9", 5, 16),
            "policies=h2o:num_recent=9, 5 slots: .* at most 4 can be",
        ),
        (
            lambda: measure.attention(models.Transformer(mixed), {}, _IDS),
            "layer 0 has a mixer and no attention weights",
        ),
        (
            lambda: evictions.caches_of(
                models.Transformer(mixed), "full", 5, 16
            ),
            "policies=full: the cache of layer 0 keeps a state",
        ),
        (
            lambda: explore.read(
                _MODEL,
                {},
                _IDS[:1],
                dataclasses.replace(
                    config, policies=("h2o",), reading="tokens"
                ),
                name="",
            ),
            "a single token is nothing to evict from",
        ),
    ):
      with self.assertRaisesRegex(errors.UserError, message):
        call()

  def test_evaluation_and_page_ask_caches_the_same(self):
    caches = evictions.caches_of(_MODEL, "h2o", _SLOTS, 16)
    self.assertTrue(all(isinstance(c, evaluate.KnowsPositions) for c in caches))


class ExploreConfigTest(parameterized.TestCase):

  @parameterized.parameters(
      ({"policies": ("h3o",)}, "policy='h3o' is unknown; there are"),
      ({"policies": ("h2o", "h2o")}, "policies=h2o,h2o has a name twice"),
      ({"max_new_tokens": 0}, "reading=prompt with max_new_tokens=0"),
      ({"max_mb": 0.0}, "max_mb"),
      ({"slots": -1}, "slots"),
      ({"max_tokens": 70_000}, "max_tokens"),
  )
  def test_wrong_settings(self, fields, message):
    with self.assertRaisesRegex(errors.UserError, message):
      explore_config.ExploreConfig(**fields)


if __name__ == "__main__":
  absltest.main()
