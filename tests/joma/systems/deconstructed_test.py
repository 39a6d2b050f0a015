"""What each relaxed form of attention may look at, and what it may not."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.systems.mixers import self_gating
from joma.transformer import attention
from joma.transformer import config as configs
from joma.transformer import model as models
from kernels_pallas import masks
from tests import draws
from tests.joma.transformer import applied

_TOLERANCE = 1e-6
_SHAPE = dict(
    vocab_size=11, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2,
    head_dim=8, hidden_dim=16, max_len=16,
)  # fmt: skip


def _model(*entries, **changes):
  config = configs.TransformerConfig(**_SHAPE | changes, attention=entries)
  model = models.Transformer(config, implementation="reference")
  tokens = jax.random.randint(jax.random.key(1), (2, 7), 0, 11)
  params = applied.params(model)
  return model, params, tokens


def _sown(model, params, tokens):
  run = jax.jit(
      lambda params, tokens: model.apply(
          {"params": params}, tokens, mutable="intermediates"
      )[1]
  )
  return run(params, tokens)["intermediates"]


class StaticTest(absltest.TestCase):

  def test_weights_of_all_layers_are_of_the_embedding(self):
    """The upper layer's weights by hand; a plain model's are others."""
    model, params, tokens = _model("static_qk", positions="none")
    seen = _sown(model, params, tokens)
    embed = np.asarray(seen["resid_embed"][0])[1]
    embed = embed / np.sqrt(np.square(embed).mean(-1, keepdims=True) + 1e-5)
    attn = params["layers_1"]["attn"]
    query = np.einsum("TD,DNH->TNH", embed, attn["query"]["kernel"])
    key = np.einsum("TD,DNH->TNH", embed, attn["key"]["kernel"])
    logits = np.einsum("TNH,SNH->NTS", query, np.repeat(key, 2, axis=1))
    logits = np.where(np.tri(7, dtype=bool)[None], 8**-0.5 * logits, -np.inf)
    want = np.asarray(jax.nn.softmax(logits))
    got = seen["layers_1"]["attn"]["attn_weights"][0][1]
    np.testing.assert_allclose(got, want, atol=1e-5)
    plain, _, _ = _model(positions="none")
    other = _sown(plain, params, tokens)["layers_1"]["attn"]["attn_weights"][0]
    self.assertGreater(float(jnp.abs(other[1] - want).max()), 1e-3)


class PositionalTest(parameterized.TestCase):

  @parameterized.parameters("positional", "positional:learned=false")
  @pytest.mark.slow
  def test_weights_do_not_depend_on_what_is_said(self, entry):
    model, params, tokens = _model(entry)
    one, two = (
        _sown(model, params, text)["layers_1"]["attn"]["attn_weights"][0]
        for text in (tokens, (tokens + 1) % 11)
    )
    self.assertEqual(one.shape, (1, 4, 7, 7))  # One for all texts.
    np.testing.assert_array_equal(one, two)
    self.assertGreater(float(jnp.abs(one - one.mean()).max()), 0.05)

  @pytest.mark.slow
  def test_outputs_are_linear_in_what_is_said(self):
    """f(c x) = c f(x); the twin adds x to the positions."""
    config = configs.TransformerConfig(**_SHAPE, attention=("positional",))
    x = draws.normal(3, 2, 7, 16)
    places = jnp.broadcast_to(jnp.arange(7)[None], (2, 7))
    plain = configs.TransformerConfig(**_SHAPE)
    rest = (places, masks.causal(7))
    for shape, is_linear in ((config, True), (plain, False)):
      module = attention.Attention(shape, 0, implementation="reference")
      params = module.init(jax.random.key(0), x, *rest)
      one, ten = (module.apply(params, c * x, *rest)[0] for c in (1, 10))
      error = float(jnp.abs(ten - 10 * one).max())
      bound = 20 * _TOLERANCE
      (self.assertLess if is_linear else self.assertGreater)(error, bound)

  @pytest.mark.slow
  def test_weights_are_computed_once_a_call(self):
    """FLOPs less those that every text needs do not grow with the texts."""
    flops = {}
    for entries in ((), ("positional",)):
      config = configs.TransformerConfig(**_SHAPE, attention=entries)
      module = attention.Attention(config, 0, implementation="reference")
      for batch in (1, 5, 9):
        x = jnp.zeros((batch, 7, 16))
        rest = (jnp.zeros((batch, 7), jnp.int32), masks.causal(7))
        params = jax.eval_shape(module.init, jax.random.key(0), x, *rest)
        run = jax.jit(lambda p, x, m=module, r=rest: m.apply(p, x, *r)[0])
        cost = run.lower(params, x).compile().cost_analysis()
        flops[bool(entries), batch] = cost["flops"]
    growth = lambda entry: (flops[entry, 9] - flops[entry, 5]) / 4
    # Of each text: value and output projections, and weights times values.
    per_text = 2 * 7 * 16 * 2 * 8 + 2 * 7 * 32 * 16 + 2 * 4 * 7 * 7 * 8
    self.assertBetween(growth(True), per_text, 1.2 * per_text)
    # Plain attention has the queries, keys and logits of each besides.
    self.assertGreater(growth(False), 1.5 * growth(True))


@functools.partial(jax.jit, static_argnums=4)
def _running_means(query, key, value, seen, scale):
  each = self_gating.steps(query, key, value, seen, scale)
  return self_gating.running_means(each)


class SelfGatingTest(absltest.TestCase):

  def test_it_is_the_weighted_mean_of_what_came_before(self):
    draw = np.random.default_rng(0).normal
    query, key, value = (
        jnp.asarray(draw(size=(1, 6, heads, 8)), jnp.float32)
        for heads in (4, 2, 2)
    )
    _, got = _running_means(query, key, value, jnp.ones((1, 6), bool), 0.7)
    query, key, value = map(np.asarray, (query, key, value))
    for head in range(4):
      gate = query[0, :, head] / (1 + np.exp(-query[0, :, head]))
      score = 0.7 * (gate * key[0, :, head // 2]).sum(axis=-1)
      for t in range(6):
        weights = np.exp(score[: t + 1]) / np.exp(score[: t + 1]).sum()
        want = weights @ value[0, : t + 1, head // 2]
        np.testing.assert_allclose(got[0, t, head], want, atol=1e-5)
    # The twin: a score that asks the query has rows of their own.
    logits = np.einsum("TH,SH->TS", query[0, :, 0], key[0, :, 0])
    apart = logits - logits[:1]
    self.assertGreater(np.abs(apart - apart[:, :1]).max(), 0.1)

  def test_scores_of_hundreds_stay_finite(self):
    big = 40 * jnp.ones((1, 3, 1, 8))
    seen = jnp.ones((1, 3), bool)
    _, got = _running_means(big, big, big, seen, 1.0)
    np.testing.assert_allclose(got, big, rtol=1e-5)


class NoMixingTest(absltest.TestCase):

  def test_no_token_changes_another(self):
    model, params, tokens = _model("no_mixing")
    one = applied.logits(model, params, tokens)
    two = applied.logits(model, params, tokens.at[0, 2].set(tokens[0, 2] ^ 1))
    differs = np.asarray(jnp.abs(one - two).max(axis=-1) > 0)
    np.testing.assert_array_equal(np.argwhere(differs), [[0, 2]])


if __name__ == "__main__":
  absltest.main()
