"""Tests of Transformers that compute chosen neurons and heads alone."""

import dataclasses
import functools

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.inference import generate
from joma.inference.sparsity import contextual_config
from joma.inference.sparsity import contextual_sparsity as sparsity
from joma.inference.sparsity import lazy_kv
from joma.inference.sparsity import plan as plan_lib
from joma.inference.sparsity import predictors
from joma.inference.sparsity import unit_rules
from joma.transformer import config as configs
from joma.transformer import full_cache
from joma.transformer import hooks
from joma.transformer import model as models
from scansnap_jax.experiment import errors
from tests.joma.transformer import applied

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
_PLAN = plan_lib.SparsityPlan(block_size=2)
# Rounding of float32 logits of size 3, of sums in another order.
_TOLERANCE = 2e-5


@functools.cache
def make_params(name):
  """Parameters of every shape, none of them 0, and random predictors."""
  config = MODELS[name]
  params = applied.params(models.Transformer(config))
  draws = np.random.default_rng(1)
  params = jax.tree.map(
      lambda leaf: leaf + 0.2 * draws.standard_normal(leaf.shape, np.float32),
      jax.device_get(params),
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

  @parameterized.parameters(("swiglu", True), ("swiglu", False))
  @pytest.mark.slow
  def test_all_units_and_heads_are_the_dense_model_bitwise(self, name, cached):
    self._check(name, cached)

  @parameterized.parameters(("relu", True), ("relu", False))
  @pytest.mark.slow  # The same paths.
  def test_likewise_in_the_other_model(self, name, cached):
    self._check(name, cached)

  def _check(self, name, cached):
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


# A rule of neurons and one of heads at once: few compilations, all paths.
_WHAT = {
    "number": dict(mlp=predicted(5), heads=unit_rules.HeadRule(num=2, rank=8)),
    "threshold, ahead": dict(
        mlp=predicted(None), heads=unit_rules.HeadRule(rank=8), lookahead=1
    ),
    "prompt, zero": dict(
        mlp=unit_rules.Griffin(num=5),
        heads=unit_rules.HeadRule(num=1, missing_kv="zero"),
    ),
    "recompute": dict(
        heads=unit_rules.HeadRule(num=1, missing_kv="recompute", period=4)
    ),
}


class DecodeTest(parameterized.TestCase):

  @parameterized.parameters(
      ("relu", "number"),
      ("swiglu", "threshold, ahead"),
      ("swiglu", "prompt, zero"),
  )
  @pytest.mark.by_default(1)
  def test_a_text_decoded_is_the_text_measured(self, name, what):
    self._check(name, what)

  @parameterized.parameters(
      ("swiglu", "number"),
      ("relu", "threshold, ahead"),
      ("relu", "prompt, zero"),
      ("swiglu", "recompute"),
      ("relu", "recompute"),
  )
  @pytest.mark.slow  # The same paths in the other model.
  def test_likewise_in_the_other_model(self, name, what):
    self._check(name, what)

  def _check(self, name, what):
    params, tokens = make_params(name), make_tokens()
    model = make_model(name, prompt_len=5, **_WHAT[what])
    expected = read(model, params, tokens)[:, 4:]
    found, _ = decode_through(model, params, tokens, 5)
    np.testing.assert_allclose(found, expected, atol=_TOLERANCE)
    dense = read(models.Transformer(MODELS[name]), params, tokens)[:, 5:]
    self.assertGreater(np.abs(dense - expected[:, 1:]).max(), 0.01)


class RecomputeTest(parameterized.TestCase):

  def test_a_prompt_that_would_miss_keys_is_no_number(self):
    # Of two sequences the second lacks the keys of one head of one token.
    config = dataclasses.replace(MODELS["relu"], num_layers=1)
    (full,) = full_cache.init(config, 2, 16)
    lazy = lazy_kv.init(full, 4, config.embed_dim)
    heads = config.num_kv_heads
    draws = jax.random.split(jax.random.key(0), 3)
    query, key, value = (
        jax.random.normal(draw, (2, 3, number, config.head_dim))
        for draw, number in zip(
            draws, (config.num_heads, heads, heads), strict=True
        )
    )
    options = hooks.AttentionOptions(scale=0.4, implementation="reference")
    ask = jax.jit(
        lambda lazy, start: lazy.attend(
            query,
            key,
            value,
            start + jnp.tile(jnp.arange(3), (2, 1)),
            lambda x, positions: x,
            options,
        )
    )
    first, lazy = ask(lazy, 0)
    self.assertTrue(np.isfinite(first).all())
    lazy = dataclasses.replace(
        lazy,
        positions=lazy.positions.at[:, 1].set(3),
        missing=lazy.missing.at[1, 1, heads - 1].set(True),
    )
    second, _ = ask(lazy, 4)
    self.assertTrue(np.isfinite(second[0]).all())
    self.assertTrue(np.isnan(second[1]).all())

  @pytest.mark.slow
  def test_after_a_flush_nothing_is_missing(self):
    self._check("swiglu")

  @pytest.mark.slow  # The same with biases and a KV head a query head.
  def test_likewise_in_the_other_model(self):
    self._check("relu")

  def _check(self, name):
    # 3 tokens of prompt and two periods of 4: the last step is a flush.
    params, tokens = make_params(name), make_tokens(seq_len=11)
    rule = unit_rules.HeadRule(num=1, missing_kv="recompute", period=4)
    always = dataclasses.replace(rule, missing_kv="always_compute_kv")
    model = make_model(name, heads=rule)
    found, lazy = decode_through(model, params, tokens, 3)
    expected, full = decode_through(
        make_model(name, heads=always), params, tokens, 3
    )
    np.testing.assert_allclose(found, expected, atol=_TOLERANCE)
    for one, other in zip(lazy, full, strict=True):
      self.assertFalse(one.missing.any())
      # Products of several tokens at once round otherwise.
      np.testing.assert_allclose(one.full.key, other.key, atol=_TOLERANCE)
      np.testing.assert_allclose(one.full.value, other.value, atol=_TOLERANCE)
    _, before = decode_through(model, params, tokens[:, :-1], 3)
    for one, other in zip(before, full, strict=True):
      missing = np.asarray(one.missing)
      self.assertTrue(missing.any())
      # What is missing is 0, and only that.
      kept = np.abs(one.full.value).sum(axis=-1)[:, :, 3:10] > 0
      self.assertEqual((~kept).sum(), missing.sum())
      np.testing.assert_array_equal(
          kept, np.abs(other.value).sum(axis=-1)[:, :, 3:10] * kept > 0
      )


class GatherTest(absltest.TestCase):

  @pytest.mark.slow
  def test_all_found_by_a_threshold_are_the_dense_model(self):
    params, tokens = dict(make_params("swiglu")), make_tokens()
    none = {"mlp_threshold": -jnp.inf, "heads_threshold": -jnp.inf}
    params["sparse"] = {
        name: {**arrays, **jax.tree.map(jnp.float32, none)}
        for name, arrays in params["sparse"].items()
    }
    model = make_model(
        "swiglu", mlp=predicted(None), heads=unit_rules.HeadRule(rank=8)
    )
    found, _ = decode_through(model, params, tokens, 5)
    expected, _ = decode_through(models.Transformer(SWIGLU), params, tokens, 5)
    # Weights lie with a row a neuron here: products may round otherwise.
    np.testing.assert_allclose(found, expected, atol=_TOLERANCE)

  @pytest.mark.slow  # Three compilations.
  def test_sequences_that_share_a_list_read_the_best_of_all(self):
    params, tokens = make_params("relu"), make_tokens()
    shared, _ = decode_through(
        make_model("relu", mlp=predicted(5), is_shared=True), params, tokens, 5
    )
    alone, _ = decode_through(
        make_model("relu", mlp=predicted(5)), params, tokens, 5
    )
    self.assertGreater(np.abs(shared - alone)[:, 1:].max(), 0.01)
    # A batch of copies has one list anyway.
    copies = jnp.repeat(tokens[:1], 2, axis=0)
    shared, _ = decode_through(
        make_model("relu", mlp=predicted(5), is_shared=True), params, copies, 5
    )
    np.testing.assert_allclose(shared[0], alone[0], atol=_TOLERANCE)


class GenerateTest(absltest.TestCase):

  @pytest.mark.slow  # Three compilations.
  def test_generation_takes_a_sparse_model_and_ragged_prompts(self):
    params = make_params("swiglu")
    model = make_model("swiglu", **_WHAT["prompt, zero"])
    prompts = [np.array([3, 1, 4, 1, 5]), np.array([9, 2])]

    def run(prompts):
      cache = full_cache.init(SWIGLU, len(prompts), 70)
      return generate.generate(
          model,
          params,
          prompts,
          max_new_tokens=6,
          kv_cache=sparsity.init_cache(model, cache),
      )

    together = run(prompts)
    # Padding has no say in which blocks a prompt chooses.
    for prompt, expected in zip(prompts, together, strict=True):
      np.testing.assert_array_equal(run([prompt])[0], expected)


class CheckTest(parameterized.TestCase):

  @parameterized.parameters(
      (dict(mlp=predicted(13)), "13 blocks .* there are 12"),
      (dict(mlp=predicted(0)), "0 blocks"),
      (dict(heads=unit_rules.HeadRule(num=5)), "5 heads .* there are 4"),
      (dict(block_size=5), "5 must divide the 24"),
      (
          dict(
              heads=unit_rules.HeadRule(chosen_by="oracle", missing_kv="zero")
          ),
          "oracle goes with missing_kv=always_compute_kv",
      ),
  )
  def test_a_plan_that_fits_no_model_is_refused(self, changes, message):
    plan = dataclasses.replace(_PLAN, **changes)
    with self.assertRaisesRegex(errors.UserError, message):
      sparsity.check(SWIGLU, plan, is_measured=True)

  @parameterized.parameters(
      (dict(mlp=unit_rules.Cats()), "Cats chooses neurons that it has"),
      (dict(mlp=unit_rules.Oracle(num=2)), "Oracle chooses"),
      (
          dict(heads=unit_rules.HeadRule(chosen_by="oracle")),
          "measured, not decoded",
      ),
  )
  def test_what_knows_too_much_does_not_decode(self, changes, message):
    plan = dataclasses.replace(_PLAN, **changes)
    sparsity.check(SWIGLU, plan, is_measured=True)
    with self.assertRaisesRegex(errors.UserError, message):
      sparsity.check(SWIGLU, plan, is_measured=False)

  @pytest.mark.slow
  def test_caches_that_evict_are_not_filled_in(self):
    with self.assertRaisesRegex(errors.UserError, "wants a FullCache"):
      lazy_kv.init(object(), 4, 16)
    cache = full_cache.init(SWIGLU, 1, 4)[0]
    with self.assertRaisesRegex(errors.UserError, "period must be at least 1"):
      lazy_kv.init(cache, 0, 16)
    rule = unit_rules.HeadRule(num=1, missing_kv="recompute")
    with self.assertRaisesRegex(errors.UserError, "caches of `init_cache`"):
      make_model("swiglu", heads=rule).apply(
          {"params": make_params("swiglu")},
          jnp.zeros((1, 1), jnp.int32),
          positions=jnp.zeros((1, 1), jnp.int32),
          kv_cache=full_cache.init(SWIGLU, 1, 4),
      )


if __name__ == "__main__":
  absltest.main()
