"""Learned keys beside the definition, sink logits, and every cache."""

import dataclasses
import functools

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.inference.cache import kv_cache
from joma.systems.cache_policies import names as policy_names
from joma.transformer import attention
from joma.transformer import config as configs
from joma.transformer import full_cache
from joma.transformer import model as models
from kernels_pallas import interpret
from kernels_pallas import masks
from tests import draws
from tests.joma.transformer import applied

# Several times the largest float32 error seen.
_TOLERANCE = 1e-5


@functools.cache
def _model(entry):
  config = configs.TransformerConfig(
      vocab_size=11,
      num_layers=2,
      embed_dim=16,
      num_heads=4,
      num_kv_heads=2,
      head_dim=8,
      hidden_dim=16,
      attention=(entry,),
  )
  model = models.Transformer(config, implementation="reference")
  tokens = jax.random.randint(jax.random.key(1), (2, 7), 0, 11)
  params = applied.params(model)
  return model, params, tokens


def _with_values(params):
  """Values of learned keys are drawn: they start at 0."""
  draw = lambda path, leaf: (
      jax.random.normal(jax.random.key(5), leaf.shape)
      if path[-1].key == "values"
      else leaf
  )
  return jax.tree_util.tree_map_with_path(draw, params)


def _oracle(query, key, value, extra_key, extra_value, scale):
  """One head of one sequence: rows of a softmax with columns in front."""
  keys = np.concatenate([extra_key, key])
  values = np.concatenate([extra_value, value])
  num_extra, rows = len(extra_key), []
  for t, one in enumerate(query):
    logits = scale * keys[: num_extra + t + 1] @ one
    weights = np.exp(logits - logits.max())
    rows.append(weights / weights.sum() @ values[: num_extra + t + 1])
  return np.stack(rows)


class KeyBiasTest(parameterized.TestCase):

  @parameterized.parameters(False, True)
  @pytest.mark.by_default(0)
  def test_output_is_that_of_the_definition(self, has_values):
    """The keys stand in front, unrotated; the twin rotates them."""
    entry = f"key_bias:keys=2:start=1.0:values={str(has_values).lower()}"
    model, params, _ = _model(entry)
    attn = _with_values(params)["layers_0"]["attn"]
    module = attention.Attention(model.config, 0, implementation="reference")
    x = draws.normal(3, 2, 7, 16)
    positions = jnp.broadcast_to(jnp.arange(7)[None], (2, 7))
    _, seen = jax.jit(
        lambda attn, x: module.apply(
            {"params": attn},
            *(x, positions, masks.causal(7)),
            mutable="intermediates",
        )
    )(attn, x)
    got = np.asarray(seen["intermediates"]["head_out"][0])
    project = lambda name: np.einsum("BTD,DNH->BTNH", x, attn[name]["kernel"])
    rotate = jax.jit(module._rotate())
    turn = lambda x: np.asarray(rotate(jnp.asarray(x), positions))
    query, key = turn(project("query")), turn(project("key"))
    value, own = project("value"), attn["key_bias"]
    extra = np.asarray(own["keys"])
    extra_values = np.asarray(own.get("values", np.zeros_like(extra)))
    first = jnp.asarray(extra).swapaxes(0, 1)[None]
    at_four = jnp.full((1, 2), 4)
    turned = np.asarray(rotate(first, at_four))[0].swapaxes(0, 1)
    for keys, is_it in ((extra, True), (turned, False)):
      want = _oracle(
          query[1, :, 3], key[1, :, 1], value[1, :, 1],
          keys[1], extra_values[1], 8**-0.5,
      )  # fmt: skip
      error = np.abs(got[1, :, 3] - want).max()
      (self.assertLess if is_it else self.assertGreater)(error, 1e-4)

  @pytest.mark.slow
  def test_a_key_of_nothing_is_a_sink_of_nothing(self):
    model, params, tokens = _model("key_bias:start=0")
    sinks, _, _ = _model("sink_logits:start=0")
    swap = lambda attn: {
        **{k: v for k, v in attn.items() if k != "key_bias"},
        "sink_logits": {"logits": jnp.zeros(4)},
    }
    swapped = {
        name: {**leaf, "attn": swap(leaf["attn"])} if "attn" in leaf else leaf
        for name, leaf in params.items()
    }
    got, want = (
        applied.loss_and_grads(*one, tokens)
        for one in ((model, params), (sinks, swapped))
    )
    chex.assert_trees_all_close(got[2], want[2], atol=_TOLERANCE)
    chex.assert_trees_all_close(
        got[1]["layers_0"]["attn"]["out"],
        want[1]["layers_0"]["attn"]["out"],
        atol=_TOLERANCE,
    )

  @parameterized.parameters("xla", "pallas_tpu")
  @pytest.mark.slow
  def test_every_implementation_gives_value_and_gradient(self, name):
    model, params, tokens = _model("key_bias:start=1.0:values=true")
    params = _with_values(params)
    want = applied.loss_and_grads(model, params, tokens)
    other = model.clone(implementation=name)
    with interpret.interpreted():
      got = applied.loss_and_grads(other, params, tokens)
    chex.assert_trees_all_close(got, want, atol=3 * _TOLERANCE)

  @parameterized.parameters("", "full", "h2o", "snapkv", "quest:num_keys=16")
  @pytest.mark.slow
  def test_every_cache_follows(self, policy):
    model, params, tokens = _model("key_bias:start=2.0:values=true")
    params = _with_values(params)
    want = applied.logits(model, params, tokens)
    cache = (
        kv_cache.init(policy_names.parse(policy), model.config, 2, 64)
        if policy
        else full_cache.init(model.config, 2, 64)
    )
    positions = jnp.broadcast_to(jnp.arange(7)[None], tokens.shape)
    found = []
    for part in (slice(0, 5), slice(5, 6), slice(6, 7)):
      logits, cache = applied.step(
          model, params, tokens[:, part], positions[:, part], cache
      )
      found.append(logits)
    got = jnp.concatenate(found, axis=1)
    chex.assert_trees_all_close(got, want, atol=_TOLERANCE)

  @pytest.mark.slow
  def test_scores_of_prompts_count_the_learned_key(self):
    """What is given to keys in all, and to the learned one, are all queries."""
    model, params, tokens = _model("key_bias:start=2.0")
    cache = kv_cache.init(policy_names.parse("h2o"), model.config, 2, 8)
    _, cache = applied.step(
        model, params, tokens,
        jnp.broadcast_to(jnp.arange(7)[None], tokens.shape), cache,
    )  # fmt: skip
    _, seen = model.apply({"params": params}, tokens, mutable="intermediates")
    weights = seen["intermediates"]["layers_0"]["attn"]["attn_weights"][0]
    want = weights.reshape(2, 2, 2, 7, 7).sum(axis=(2, 3))
    score = jnp.take_along_axis(
        cache[0].score, jnp.argsort(cache[0].pos, axis=-1)[..., 1:], axis=-1
    )
    chex.assert_trees_all_close(score, want, atol=_TOLERANCE)
    self.assertLess(float(want.sum()), 2 * 4 * 7 - 1)

  @pytest.mark.slow
  def test_dropping_concerns_the_learned_keys_too(self):
    model, params, tokens = _model("key_bias:start=2.0:values=true")
    params = _with_values(params)
    config = dataclasses.replace(model.config, attn_dropout=1e-9)
    dropping = models.Transformer(config, implementation="reference")
    got = dropping.apply(
        {"params": params},
        tokens,
        is_training=True,
        rngs={"dropout": jax.random.key(0)},
    )
    want = applied.logits(model, params, tokens)
    chex.assert_trees_all_close(got, want, atol=_TOLERANCE)


if __name__ == "__main__":
  absltest.main()
