"""Differential attention: pairs of heads, by hand and beside transformers."""

import dataclasses

from absl.testing import absltest
from absl.testing import parameterized
import jax.numpy as jnp
import numpy as np
import pytest

from joma.inference.cache import kv_cache
from joma.systems.cache_policies.by_attention import h2o
from joma.transformer import config as configs
from joma.transformer import full_cache
from scansnap_jax.experiment import errors
from tests.joma.systems import one_layer

_EPSILON = 1e-5


def _without_rotation(**changes):
  return dataclasses.replace(one_layer.CONFIG, positions="none", **changes)


def _by_hand(config, params, x, share, first):
  """Heads' outputs of one layer, in float64; share is lambda."""
  project = lambda name: np.einsum(
      "BTD,DNH->BNTH", np.float64(x), np.float64(params[name]["kernel"])
  )
  query, key, value = (project(name) for name in ("query", "key", "value"))
  group = config.num_heads // config.num_kv_heads
  seen = np.tri(x.shape[1], dtype=bool)

  def weights(head):
    logits = query[:, head] @ key[:, head // group].swapaxes(1, 2) / 8**0.5
    raised = np.where(seen, np.exp(logits), 0)
    return raised / raised.sum(axis=-1, keepdims=True)

  pairs, rows = config.num_heads // 2, []
  for head in range(pairs):
    two = [head // group, head // group + config.num_kv_heads // 2]
    values = np.concatenate([value[:, one] for one in two], axis=-1)
    apart = (weights(head) - share * weights(head + pairs)) @ values
    size = np.square(apart).mean(axis=-1, keepdims=True)
    rows.append((1 - first) * apart / np.sqrt(size + _EPSILON))
  return np.stack(rows, axis=2).reshape(*x.shape[:2], config.num_heads, 8)


class DifferentialTest(parameterized.TestCase):

  @parameterized.parameters(0, 3)
  @pytest.mark.by_default(1)
  def test_a_head_is_taken_from_the_first_of_its_pair(self, layer):
    config = _without_rotation(num_layers=4)
    config, params, x = one_layer.draw("differential:start=0.5", config, layer)
    a, b, c, d = np.asarray(params["differential"]["vectors"])
    first = 0.8 - 0.6 * np.exp(-0.3 * layer)
    share = np.exp(a @ b) - np.exp(c @ d) + first
    got = one_layer.head_out(config, params, x, layer)
    want = _by_hand(config, params, x, share, first)
    np.testing.assert_allclose(got, want, atol=1e-5)

  @parameterized.parameters("reference", "xla")
  @pytest.mark.slow
  def test_lambda_of_zero_is_plain_attention(self, implementation):
    """First heads of pairs, and values of two heads: twice the key size."""
    config, params, x = one_layer.draw("differential", _without_rotation())
    vectors = jnp.zeros((4, 8)).at[2:, 0].set(np.log(1.2) ** 0.5)
    params["differential"]["vectors"] = vectors  # 1 - 1.2 + .2
    plain, _, _ = one_layer.draw("", _without_rotation())
    read = one_layer.head_out(plain, params, x)
    swapped = params["value"]["kernel"][:, ::-1]
    other = params | {"value": {"kernel": swapped}}
    both = [read[:, :, :2], one_layer.head_out(plain, other, x)[:, :, :2]]
    both = np.concatenate(both, axis=-1)
    size = np.square(both).mean(axis=-1, keepdims=True)
    want = 0.8 * both / np.sqrt(size + _EPSILON)
    got = one_layer.head_out(config, params, x, 0, implementation)
    np.testing.assert_allclose(got, want.reshape(got.shape), atol=2e-6)

  def test_what_does_not_fit_is_refused_by_name(self):
    with self.assertRaisesRegex(errors.UserError, "num_kv_heads=1 must be ev"):
      one_layer.draw("differential", _without_rotation(num_kv_heads=1))
    config, _, _ = one_layer.draw("differential")
    with self.assertRaisesRegex(errors.UserError, "differential keeps"):
      kv_cache.init(h2o.H2O(), config, 2, 12)
    turned = configs.RopeConfig(rope_type="dynamic", factor=2.0)
    with self.assertRaisesRegex(errors.UserError, "differential keeps rotated"):
      full_cache.init(dataclasses.replace(config, rope=turned), 2, 12)


class TransformersTest(absltest.TestCase):

  def test_equals_eager_diffllama(self):
    """The attention alone of a layer that is not the first."""
    try:
      import torch
      import transformers
      from transformers.models.diffllama import modeling_diffllama as peer_lib
    except ImportError:
      self.skipTest("torch or transformers is not installed: the extra bench")
    peer_config = transformers.DiffLlamaConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rms_norm_eps=_EPSILON,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        attn_implementation="eager",
    )
    peer = peer_lib.DiffLlamaAttention(peer_config, layer_idx=2).eval()
    one_layer.random_weights(peer, torch)
    turn = peer_lib.DiffLlamaRotaryEmbedding(peer_config)
    x = torch.randn(2, 9, 16)
    with torch.no_grad():
      places = torch.arange(9)[None].expand(2, 9)
      want, _ = peer(x, turn(x, places), torch.tensor(one_layer.causal(9)))
    config = dataclasses.replace(
        one_layer.CONFIG, num_layers=3, attention=("differential",)
    )
    names = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
    vectors = [one_layer.array(getattr(peer, name)) for name in names]
    params = {
        "query": one_layer.kernel(peer.q_proj, 16, 4, 8),
        "key": one_layer.kernel(peer.k_proj, 16, 2, 8),
        "value": one_layer.kernel(peer.v_proj, 16, 2, 8),
        "out": one_layer.kernel(peer.o_proj, 4, 8, 16),
        "differential": {"vectors": jnp.stack(vectors)},
    }
    got, _ = one_layer.run(config, params, one_layer.array(x), layer=2)
    error = float(np.abs(np.asarray(got) - want.numpy()).max())
    print(f"largest difference from transformers: {error:.1e}")
    self.assertLess(error, 1e-5)


if __name__ == "__main__":
  absltest.main()
