"""Tests of Transformers that compute chosen neurons and heads alone."""

import dataclasses
import functools

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from joma.inference import contextual_config
from joma.inference import contextual_sparsity as sparsity
from joma.inference import predictors
from joma.inference import unit_rules
from joma.transformer import config as configs
from joma.transformer import full_cache
from joma.transformer import model as models

_SIZES = dict(
    vocab_size=31,
    num_layers=2,
    embed_dim=16,
    num_heads=4,
    head_dim=8,
    hidden_dim=24,
    max_len=64,
)
# OPT-like: multi-head, biases everywhere, learned positions.
RELU = configs.TransformerConfig(
    **_SIZES,
    num_kv_heads=4,
    norm="layer_norm",
    positions="learned",
    activation="relu",
    use_gated_mlp=False,
    use_qkv_bias=True,
    use_attn_out_bias=True,
    use_mlp_bias=True,
)
# Llama-like, with grouped queries and normalized keys.
SWIGLU = configs.TransformerConfig(**_SIZES, num_kv_heads=2, use_qk_norm=True)
MODELS = {"relu": RELU, "swiglu": SWIGLU}
_NUM_UNITS = 12
_PLAN = sparsity.SparsityPlan(block_size=2)
# Rounding of float32 logits of size 3, of sums in another order.
_TOLERANCE = 2e-5


@functools.cache
def make_params(name):
  """Parameters of every shape, none of them 0, and random predictors."""
  config = MODELS[name]
  init = jax.jit(models.Transformer(config).init)
  params = init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
  keys = iter(jax.random.split(jax.random.key(1), 200))
  params = jax.tree.map(
      lambda leaf: leaf + 0.2 * jax.random.normal(next(keys), leaf.shape),
      params,
  )
  predictor = predictors.init(
      contextual_config.PredictorConfig(rank=8, head_rank=8),
      2,
      16,
      _NUM_UNITS,
      4,
  )
  thresholds = {
      "mlp": jnp.array([0.5, -0.5]),
      "heads": jnp.array([0.5, -0.5]),
  }
  calibrated = {
      name: jnp.array([0.2, 0.4]) for name in ("cats", "teal", "teal_inputs")
  }
  return sparsity.prepare(
      config,
      params,
      predictors=predictor,
      thresholds=thresholds,
      calibrated=calibrated,
  )


def make_tokens(batch=2, seq_len=14):
  return jnp.asarray(
      np.random.default_rng(0).integers(31, size=(batch, seq_len))
  )


@functools.partial(jax.jit, static_argnames="model")
def read(model, params, tokens):
  return model.apply({"params": params}, tokens)


@functools.partial(jax.jit, static_argnames=("model", "prompt_len"))
def decode_through(model, params, tokens, prompt_len):
  """Logits of every token from the last of the prompt on, and the cache."""
  cache = full_cache.init(model.config, *tokens.shape)
  if isinstance(model, sparsity.SparseTransformer):
    cache = sparsity.init_cache(model, cache)
  prompt = tokens[:, :prompt_len]
  logits, cache = model.apply({"params": params}, prompt, kv_cache=cache)

  def step(cache, inputs):
    token, position = inputs
    logits, cache = model.apply(
        {"params": params},
        token[:, None],
        positions=jnp.broadcast_to(position, token.shape)[:, None],
        kv_cache=cache,
    )
    return cache, logits[:, 0]

  positions = jnp.arange(prompt_len, tokens.shape[1])
  rest = tokens[:, prompt_len:].T
  cache, found = jax.lax.scan(step, cache, (rest, positions))
  found = jnp.concatenate([logits[:, -1:], found.swapaxes(0, 1)], axis=1)
  return found, cache


def make_model(name, **changes):
  plan = dataclasses.replace(_PLAN, **changes)
  return sparsity.SparseTransformer(MODELS[name], plan=plan)


def predicted(num):
  return unit_rules.Predicted(num=num, rank=8, num_units=_NUM_UNITS)


class AllTest(parameterized.TestCase):

  @parameterized.product(name=("relu", "swiglu"), cached=(False, True))
  def test_all_units_and_heads_are_the_dense_model_bitwise(self, name, cached):
    params, tokens = make_params(name), make_tokens()
    model = make_model(
        name,
        mlp=predicted(_NUM_UNITS),
        heads=unit_rules.HeadRule(num=4),
        prompt_len=3,
    )
    dense = models.Transformer(MODELS[name])
    if cached:
      found, _ = decode_through(model, params, tokens, 5)
      expected, _ = decode_through(dense, params, tokens, 5)
    else:
      found = read(model, params, tokens)
      expected = read(dense, params, tokens)
    np.testing.assert_array_equal(found, expected)


class DecodeTest(parameterized.TestCase):

  @parameterized.product(
      name=("relu", "swiglu"),
      what=(
          dict(mlp=predicted(5)),
          dict(mlp=predicted(None)),
          dict(mlp=predicted(5), lookahead=1),
          dict(mlp=unit_rules.Griffin(num=5)),
          dict(heads=unit_rules.HeadRule(num=2, rank=8)),
          dict(heads=unit_rules.HeadRule(rank=8), lookahead=1),
          dict(heads=unit_rules.HeadRule(num=2, missing_kv="zero")),
          dict(
              mlp=predicted(5),
              heads=unit_rules.HeadRule(num=1, missing_kv="zero"),
          ),
      ),
  )
  def test_a_text_decoded_is_the_text_measured(self, name, what):
    params, tokens = make_params(name), make_tokens()
    model = make_model(name, prompt_len=5, **what)
    expected = read(model, params, tokens)[:, 4:]
    found, _ = decode_through(model, params, tokens, 5)
    np.testing.assert_allclose(found, expected, atol=_TOLERANCE)
    dense = read(models.Transformer(MODELS[name]), params, tokens)[:, 5:]
    self.assertGreater(np.abs(dense - expected[:, 1:]).max(), 0.01)


if __name__ == "__main__":
  absltest.main()
