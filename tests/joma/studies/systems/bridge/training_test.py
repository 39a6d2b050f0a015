from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.studies.systems.bridge import layer
from joma.studies.systems.bridge import training
from scansnap_jax import dynamics

_M, _B, _C = 5, 3, 4
_FREE = training.Setting(_M, "free", False, False, "sgd", 2.0)


def _batches(seed, shape):
  rng = np.random.default_rng(seed)
  draw = lambda *size: jnp.asarray(rng.integers(0, _M, size), jnp.int32)
  return training.Batches(draw(*shape, _C), draw(*shape), draw(*shape))


_SOME = _batches(0, (2, 2, _B))
_OTHERS = _batches(1, (2, 2, _B))
_PROBE = training.Probe(
    jnp.arange(_M, dtype=jnp.int32)[None].repeat(2, 0),
    jnp.array([[1, 3], [0, 0]], jnp.int32),
)


def _steps(batches):
  """Samples of each step."""
  flat = [np.asarray(x).reshape(-1, *x.shape[2:]) for x in batches]
  return [[*zip(*step, strict=True)] for step in zip(*flat, strict=True)]


def _slopes(decoder, attn_logits, samples):
  """Means of Lemma 1 over samples."""
  found = [
      dynamics.lemma1_gradients(
          jnp.asarray(decoder, jnp.float32),
          jnp.asarray(attn_logits, jnp.float32),
          jnp.bincount(jnp.asarray(context), length=_M),
          int(query),
          int(label),
      )
      for context, query, label in samples
  ]
  return [np.mean(each, axis=0) for each in zip(*found, strict=True)]


class TrainTest(parameterized.TestCase):

  def test_free_matrices_follow_lemma_1(self):
    found = training.train(_FREE, jnp.int32(0), _SOME, _OTHERS, _PROBE)
    decoder, attn_logits, twin = (np.zeros((_M, _M)) for _ in range(3))
    for own, other in zip(_steps(_SOME), _steps(_OTHERS), strict=True):
      for_decoder, for_logits = _slopes(decoder, attn_logits, own)
      _, for_twin = _slopes(decoder, twin, other)
      decoder = decoder + 2 * for_decoder
      attn_logits = attn_logits + 0.2 * for_logits
      twin = twin + 0.2 * for_twin
    for logits, mass in ((attn_logits, found.mass), (twin, found.flow)):
      self.assertGreater(np.abs(logits).max(), 1e-3)
      weights = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
      want = [(weights[1] + weights[3]) / 2, weights[0]]
      np.testing.assert_allclose(mass[-1], want, rtol=1e-4)

  @pytest.mark.slow
  def test_a_twin_on_the_same_samples_is_the_layer(self):
    for has_residual in (False, True):
      setting = _FREE._replace(has_residual=has_residual)
      found = training.train(setting, jnp.int32(0), _SOME, _SOME, _PROBE)
      np.testing.assert_allclose(found.mass, found.flow, rtol=1e-5)

  @pytest.mark.slow
  def test_attention_that_is_held_stays_equal(self):
    setting = _FREE._replace(num_held=2)
    found = training.train(setting, jnp.int32(0), _SOME, _OTHERS, _PROBE)
    for mass in (found.mass, found.flow):
      np.testing.assert_allclose(mass[0], 1 / _M, rtol=1e-6)
      self.assertGreater(np.abs(mass[1] - 1 / _M).max(), 1e-4)


class LayerTest(parameterized.TestCase):

  @parameterized.parameters("frozen", "untied", "tied")
  @pytest.mark.slow
  def test_a_block_by_hand(self, embeddings):
    params = layer.init(
        jax.random.key(0),
        _M,
        embeddings=embeddings,
        has_residual=True,
        has_mlp=True,
    )
    rng = np.random.default_rng(0)
    params = {
        name: jnp.asarray(rng.normal(size=value.shape) / 8, jnp.float32)
        for name, value in params.items()
    }
    self.assertEqual("unembedding" in params, embeddings != "tied")
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    e = p["embedding"]
    context, query = [1, 1, 4, 0], 2
    z = [e[query] @ p["query_key"] @ e[l] for l in context]
    share = np.exp(z) / np.exp(z).sum()
    attended = np.zeros(_M)
    for l, weight in zip(context, share, strict=True):
      attended[l] += weight
    features = attended / np.linalg.norm(attended)
    hidden = sum(f * e[l] for l, f in enumerate(features)) @ p["value"]
    hidden += e[query]
    size = np.sqrt((hidden**2).mean() + 1e-6)
    hidden += np.maximum(hidden / size @ p["mlp_in"], 0) @ p["mlp_out"]
    want = p.get("unembedding", e) @ hidden
    found = layer.predict(
        params,
        layer.attn_logits(params),
        jnp.array([context]),
        jnp.array([query]),
        has_residual=True,
    )
    np.testing.assert_allclose(found[0], want, atol=1e-4)

  def test_frozen_embeddings_have_no_rate(self):
    frozen = _FREE._replace(embeddings="frozen")
    free = jnp.bool_(True)
    self.assertEqual(training.rate_of(frozen, "embedding", free), 0)
    self.assertEqual(training.rate_of(frozen, "unembedding", free), 0)
    self.assertEqual(training.rate_of(frozen, "value", free), 2)
    self.assertAlmostEqual(
        float(training.rate_of(frozen, "query_key", free)), 0.2
    )


if __name__ == "__main__":
  absltest.main()
