"""Gates find the heads that were planted, and the cache that they are for."""

import functools

from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.inference.cache import kv_cache
from joma.systems.cache_policies.own_cache import duo_attention
from joma.systems.profiles import retrieval_heads
from joma.systems.score_rules import duo_gates
from joma.transformer import config as configs
from joma.transformer import model as models
from tests.joma.transformer import applied

_PLANTED = ((1,), (0,))
_LENGTH, _NEAR = 24, 4


@functools.cache
def _planted():
  """Heads read by content, of keys anywhere, or their own place alone."""
  config = configs.TransformerConfig(
      vocab_size=13,
      num_layers=2,
      embed_dim=16,
      num_heads=4,
      num_kv_heads=2,
      head_dim=8,
      hidden_dim=8,
      embed_scale=4.0,
      use_qkv_bias=True,
  )
  model = models.Transformer(config, implementation="reference")
  tokens = jax.random.randint(jax.random.key(1), (2, _LENGTH), 0, 13)
  params = applied.params(model)
  for layer, heads in enumerate(_PLANTED):
    attn = params[f"layers_{layer}"]["attn"]
    for head in set(range(2)) - set(heads):
      # Rotated, one vector is like itself and like no other place's.
      for name, where in (
          ("query", slice(2 * head, 2 * head + 2)),
          ("key", head),
      ):
        kernel, bias = attn[name]["kernel"], attn[name]["bias"]
        attn[name]["kernel"] = kernel.at[:, where].set(0.0)
        attn[name]["bias"] = bias.at[where].set(12.0)
  return model, params, tokens


def _in_steps(model, params, tokens, heads):
  """Logits of the last token, of a cache that gives other heads a window."""
  policy = duo_attention.DuoAttention(
      num_sinks=1, retrieval_heads=heads, window_capacity=_NEAR + 1
  )
  cache = kv_cache.init(policy, model.config, len(tokens), _LENGTH)
  for t in range(_LENGTH):
    one, place = tokens[:, t : t + 1], jnp.full((len(tokens), 1), t)
    logits, cache = applied.step(model, params, one, place, cache)
  return logits[:, -1]


class RetrievalHeadsTest(absltest.TestCase):

  @pytest.mark.slow
  def test_planted_heads_are_found_and_serve_the_cache(self):
    """The twin's gates cost nothing: none falls, and all are found."""
    model, params, tokens = _planted()
    is_answer = jnp.ones(tokens.shape).at[:, : _LENGTH // 2].set(0)
    find = lambda penalty: retrieval_heads.gates(
        model,
        params,
        tokens,
        is_answer,
        retrieval_heads.Settings(sinks=1, recent=_NEAR, lr=0.1, num_steps=25),
        penalty,
    )
    found = retrieval_heads.above(find(0.05))
    self.assertEqual(found, _PLANTED)
    self.assertEqual(retrieval_heads.above(find(0.0)), ((0, 1), (0, 1)))
    want = applied.logits(model, params, tokens)[:, -1]
    apart = lambda heads: float(
        jnp.abs(_in_steps(model, params, tokens, heads) - want).max()
    )
    self.assertLess(apart(found), 1e-3)
    self.assertGreater(apart(((0,), (1,))), 0.05)

  def test_weights_lie_between_those_of_all_and_of_the_stream(self):
    rng = np.random.default_rng(0)
    logits = np.float32(rng.normal(size=(1, 2, 6, 6)))
    logits[:, :, *np.triu_indices(6, 1)] = -np.inf
    system = duo_gates.DuoGates(sinks=1, recent=2)
    found = system.of_logits(jnp.asarray(logits), jnp.array([1.0, 0.25]))
    whole = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    near = np.exp(logits) * (np.tri(6) - np.tri(6, k=-2) + np.eye(1, 6) > 0)
    near /= near.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(found[0, 0], whole[0, 0], atol=1e-6)
    want = 0.25 * whole[0, 1] + 0.75 * near[0, 1]
    np.testing.assert_allclose(found[0, 1], want, atol=1e-6)


if __name__ == "__main__":
  absltest.main()
