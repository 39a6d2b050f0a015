"""Learned sinks beside plain numbers, every cache and transformers."""

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
from joma.transformer.weighing import rule as weighing
from kernels_pallas import masks
from scansnap_jax.experiment import errors
from tests import draws
from tests.joma.transformer import applied

# Several times the largest float32 error seen.
_TOLERANCE = 1e-5
# As many slots in every layer.
# As many slots in each layer, of which a model has no more than positions.
_EVEN = {"pyramidkv": "pyramidkv:beta=1", "by_layer": "by_layer:ratio=1"}
_POLICIES = tuple(_EVEN.get(name, name) for name in policy_names.POLICIES)
_WRAPPED = tuple(
    f"{_EVEN.get(name, name)}:snapkv" for name in policy_names.WRAPPERS
)
_REFUSING = ("adakv:snapkv",)
_SHAPE = dict(
    vocab_size=11,
    num_layers=2,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    hidden_dim=16,
    max_len=64,
)


@functools.cache
def _model(entry, **changes):
  config = configs.TransformerConfig(
      **_SHAPE | changes, attention=(entry,) if entry else ()
  )
  model = models.Transformer(config, implementation="reference")
  tokens = jax.random.randint(jax.random.key(1), (2, 7), 0, 11)
  params = applied.params(model)
  return model, params, tokens


def _weights(attn_logits, sinks):
  """The oracle: one more column in a softmax, left out again."""
  sinks = np.broadcast_to(
      sinks[None, :, None, None], (*attn_logits.shape[:3], 1)
  )
  both = np.concatenate([np.asarray(attn_logits), sinks], axis=-1)
  both = np.exp(both - both.max(axis=-1, keepdims=True))
  return (both / both.sum(axis=-1, keepdims=True))[..., :-1]


def _layer(params, sinks=(0.3, -1.0, 2.0, 0.0)):
  """Attention of one layer with sinks of its own, and all that is sown."""
  config = configs.TransformerConfig(**_SHAPE, attention=("sink_logits",))
  module = attention.Attention(config, 0, implementation="reference")
  x = draws.normal(3, 2, 7, 16)
  positions = jnp.broadcast_to(jnp.arange(7)[None], (2, 7))
  params = {**params["layers_0"]["attn"]}
  params["sink_logits"] = {"logits": jnp.array(sinks)}
  (out, _, _), seen = module.apply(
      {"params": params},
      x,
      positions,
      masks.causal(7, 7),
      mutable="intermediates",
  )
  return out, {k: v[0] for k, v in seen["intermediates"].items()}, params, x


class SinkLogitsTest(parameterized.TestCase):

  def test_weights_and_output_are_those_of_the_equation(self):
    _, params, _ = _model("sink_logits")
    _, seen, params, x = _layer(params)
    sinks = np.asarray(params["sink_logits"]["logits"])
    want = _weights(seen["attn_logits"], sinks)
    np.testing.assert_allclose(seen["attn_weights"], want, atol=_TOLERANCE)
    value = jnp.einsum("BSD,DKH->BSKH", x, params["value"]["kernel"])
    value = np.repeat(value, 2, axis=2)
    want = np.einsum("BNTS,BSNH->BTNH", want, value)
    np.testing.assert_allclose(seen["head_out"], want, atol=_TOLERANCE)

  @pytest.mark.slow
  def test_without_sinks_it_is_softmax(self):
    plain, params, tokens = _model("")
    model, _, _ = _model("sink_logits")
    for layer in ("layers_0", "layers_1"):
      attn = {"sink_logits": {"logits": jnp.full((4,), -1e9)}}
      params = {
          **params,
          layer: {**params[layer], "attn": {**params[layer]["attn"], **attn}},
      }
    got = applied.loss_and_grads(model, params, tokens)
    want = applied.loss_and_grads(plain, params, tokens)
    for one, two, factor in zip(got, want, (1, 3, 1), strict=True):
      chex.assert_trees_all_close(one, two, atol=factor * _TOLERANCE)

  def test_rows_and_the_sink_sum_to_one(self):
    _, params, _ = _model("sink_logits")
    _, seen, params, _ = _layer(params)
    sinks = np.asarray(params["sink_logits"]["logits"])[None, :, None]
    lse = np.logaddexp(jax.nn.logsumexp(seen["attn_logits"], axis=-1), sinks)
    total = seen["attn_weights"].sum(axis=-1) + np.exp(sinks - lse)
    np.testing.assert_allclose(total, 1, atol=_TOLERANCE)

  @pytest.mark.slow
  def test_sinks_learn_and_a_sink_behind_softmax_is_another_thing(self):
    """With n equal logits of 0 a sink of 0 leaves n / (n + 1).

    The twin multiplies softmax by 1 / (1 + exp(sink)), whatever n: it must miss
    the law.
    """
    left = lambda weights: np.asarray(weights).sum(axis=-1)[0, 0]
    rule = lambda n: weighing.softmax(jnp.zeros((1, 1, n)), jnp.zeros((1, 1)))[
        0
    ]
    twin = lambda n: jax.nn.softmax(jnp.zeros((1, 1, n))) / 2
    wants = {n: n / (n + 1) for n in (1, 4, 64)}
    errors_of = lambda form: max(
        abs(float(left(form(n))) - want) for n, want in wants.items()
    )
    self.assertLess(errors_of(rule), _TOLERANCE)
    self.assertGreater(errors_of(twin), 0.4)
    model, params, tokens = _model("sink_logits")
    _, grads, _ = applied.loss_and_grads(model, params, tokens)
    grads = grads["layers_1"]["attn"]["sink_logits"]["logits"]
    self.assertGreater(float(jnp.abs(grads).min()), 0)

  @parameterized.parameters("", *_POLICIES, *_WRAPPED)
  @pytest.mark.slow
  def test_every_cache_follows_or_says_that_it_cannot(self, policy):
    """Of a text that all of them keep whole."""
    model, params, tokens = _model("sink_logits:start=1.5")
    want = applied.logits(model, params, tokens)
    cache = (
        kv_cache.init(policy_names.parse(policy), model.config, 2, 64)
        if policy
        else full_cache.init(model.config, 2, 64)
    )
    if policy in _REFUSING:
      with self.assertRaisesRegex(
          errors.UserError, "cannot follow sink_logits"
      ):
        model.apply({"params": params}, tokens, kv_cache=cache)
      return
    positions = jnp.broadcast_to(jnp.arange(7)[None], tokens.shape)
    found = []
    for part in (slice(0, 5), slice(5, 6), slice(6, 7)):
      logits, cache = applied.step(
          model, params, tokens[:, part], positions[:, part], cache
      )
      found.append(logits)
    got = jnp.concatenate(found, axis=1)
    chex.assert_trees_all_close(got, want, atol=_TOLERANCE)


class TransformersTest(parameterized.TestCase):

  @parameterized.parameters(False, True)
  def test_equals_eager_gpt_oss(self, has_window):
    """The attention alone, on the same weights."""
    try:
      import torch
      import transformers
      from transformers.models.gpt_oss import modeling_gpt_oss as peer_lib
    except ImportError:
      self.skipTest("torch or transformers is not installed: the extra bench")
    torch.manual_seed(0)
    window = 3 if has_window else None
    layer_type = "sliding_attention" if has_window else "full_attention"
    peer_config = transformers.GptOssConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        layer_types=[layer_type],
        sliding_window=3,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        attention_bias=True,
        attn_implementation="eager",
    )
    peer = peer_lib.GptOssAttention(peer_config, layer_idx=0).eval()
    for weight in peer.parameters():
      torch.nn.init.normal_(weight, std=0.5)
    x = torch.randn(2, 9, 16)
    turn = peer_lib.GptOssRotaryEmbedding(peer_config)
    positions = torch.arange(9)[None].expand(2, 9)
    seen = np.asarray(masks.allowed(masks.causal(9, 9), 9))
    if window:
      seen = seen & ~np.tri(9, k=-window, dtype=bool)
    mask = torch.where(torch.tensor(seen), 0.0, -torch.inf)[None, None]
    with torch.no_grad():
      want, _ = peer(x, turn(x, positions), mask)
    config = configs.TransformerConfig(
        **_SHAPE | dict(num_layers=1),
        windows=(window or 0,),
        use_qkv_bias=True,
        use_attn_out_bias=True,
        attention=("sink_logits",),
    )
    array = lambda tensor: jnp.asarray(tensor.detach().numpy())
    project = lambda module, num: {
        "kernel": array(module.weight).T.reshape(16, num, 8),
        "bias": array(module.bias).reshape(num, 8),
    }
    params = {
        "query": project(peer.q_proj, 4),
        "key": project(peer.k_proj, 2),
        "value": project(peer.v_proj, 2),
        "out": {
            "kernel": array(peer.o_proj.weight).T.reshape(4, 8, 16),
            "bias": array(peer.o_proj.bias),
        },
        "sink_logits": {"logits": array(peer.sinks)},
    }
    module = attention.Attention(config, 0, implementation="reference")
    positions = jnp.broadcast_to(jnp.arange(9)[None], (2, 9))
    got, _, _ = module.apply(
        {"params": params}, array(x), positions, masks.causal(9, 9)
    )
    error = float(np.abs(np.asarray(got) - want.numpy()).max())
    print(f"largest difference from transformers: {error:.1e}")
    self.assertLess(error, 1e-5)


if __name__ == "__main__":
  absltest.main()
