"""Gated DeltaNet and Kimi Delta Attention: the recurrence, states, peers."""

import dataclasses

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.inference.cache import kv_cache
from joma.systems.cache_policies.by_attention import h2o
from joma.transformer import full_cache
from kernels_pallas import masks
from scansnap_jax.experiment import errors
from tests.joma.systems import one_layer

_SILU = lambda x: x / (1 + np.exp(-x))
_SIGMOID = lambda x: 1 / (1 + np.exp(-x))


def _by_hand(params, x, system):
  """Heads' outputs of one text [T, D], position by position, in float64."""
  own = {name: np.float64(leaf) for name, leaf in params[system].items()}
  x = np.float64(x)
  num_heads = own["beta"].shape[1]

  def convolved(name):
    rows = np.einsum("TD,DNH->TNH", x, np.float64(params[name]["kernel"]))
    made = np.zeros_like(rows)
    for u, kernel in enumerate(own[name]):
      made[u:] += kernel * rows[: len(rows) - u]
    return np.repeat(_SILU(made), num_heads // made.shape[1], axis=1)

  unit = lambda x: x / np.sqrt(np.square(x).sum(-1, keepdims=True) + 1e-6)
  query, key = unit(convolved("query")), unit(convolved("key"))
  value, beta = convolved("value"), _SIGMOID(x @ own["beta"])
  if system == "gdn":
    inner = x @ own["decay"] + own["decay_bias"]
    decay = np.exp(-np.exp(own["decay_log"]) * np.log1p(np.exp(inner)))
    decay = np.repeat(decay[..., None], query.shape[-1], axis=-1)
    opening = _SILU(np.einsum("TD,DNH->TNH", x, own["gate"]))
  else:
    low = lambda name: np.einsum(
        "TR,RNH->TNH", x @ own[f"{name}_in"], own[f"{name}_out"]
    )
    inner = low("decay") + own["decay_bias"]
    size = np.exp(own["decay_log"])[:, None]
    decay = np.exp(-size * np.log1p(np.exp(inner)))
    opening = _SIGMOID(low("gate"))
  state, rows = np.zeros((num_heads,) + (query.shape[-1],) * 2), []
  for t in range(len(x)):
    state = decay[t][..., None] * state
    missing = value[t] - np.einsum("NHJ,NH->NJ", state, key[t])
    state += beta[t][:, None, None] * key[t][..., None] * missing[:, None]
    out = np.einsum("NHJ,NH->NJ", state, query[t]) / key.shape[-1] ** 0.5
    size = np.square(out).mean(axis=-1, keepdims=True) + 1e-5
    rows.append(out / np.sqrt(size) * own["scale"] * opening[t])
  return np.stack(rows), state


class DeltaLayerTest(parameterized.TestCase):

  @parameterized.parameters("gdn", "kda")
  @pytest.mark.by_default(1)
  def test_one_pass_is_the_recurrence(self, system):
    config, params, x = one_layer.draw(system)
    got = one_layer.head_out(config, params, x, 0, "xla")
    for row in range(2):
      want, _ = _by_hand(params, x[row], system)
      np.testing.assert_allclose(got[row], want, atol=2e-5)

  @parameterized.parameters("gdn", "kda")
  @pytest.mark.slow
  def test_padded_prompts_leave_the_states_of_each_alone(self, system):
    config, params, x = one_layer.draw(system)
    padded = one_layer.state_after(config, params, x, (9, 5))
    for row, length in enumerate((9, 5)):
      _, want = _by_hand(params, x[row, :length], system)
      np.testing.assert_allclose(
          padded[row], want, atol=1e-6 * np.abs(want).max() + 1e-6
      )

  @parameterized.parameters("gdn", "kda")
  @pytest.mark.slow
  def test_packed_documents_are_those_alone(self, system):
    """Neither the state nor the convolution reads the document before."""
    config, params, x = one_layer.draw(system)
    ids = np.array([[0, 0, 0, 0, 1, 1, 2, 2, 2], [0] * 9])
    got = one_layer.head_out(
        config, params, x, 0, "xla", masks.document(jnp.asarray(ids))
    )
    for start, stop in ((0, 4), (4, 6), (6, 9)):
      want, _ = _by_hand(params, x[0, start:stop], system)
      np.testing.assert_allclose(got[0, start:stop], want, atol=2e-5)

  def test_a_state_has_one_size_and_nothing_to_evict(self):
    config = dataclasses.replace(one_layer.CONFIG, attention=("gdn",))
    num_bytes = lambda capacity: [
        (leaf.shape, leaf.nbytes)
        for leaf in jax.tree.leaves(full_cache.init(config, 2, capacity))
    ]
    self.assertEqual(num_bytes(8), num_bytes(1 << 20))
    self.assertFalse(
        hasattr(full_cache.init(config, 2, 8)[0], "kept_positions")
    )
    with self.assertRaisesRegex(errors.UserError, "nothing to evict"):
      kv_cache.init(h2o.H2O(), config, 2, 12)

  @parameterized.parameters("gdn", "kda")
  def test_decays_are_drawn_below_what_is_told(self, system):
    """The paper's draws, scaled: A from .01 to 16 where nothing is told."""
    drawn = lambda entry: np.exp(one_layer.draw(entry)[1][system]["decay_log"])
    paper = drawn(system)
    self.assertBetween(paper.min(), 0.01, paper.max())
    self.assertLess(paper.max(), 16)
    np.testing.assert_allclose(
        drawn(f"{system}:start=0.8"), paper / 20, rtol=1e-4
    )

  def test_says_what_would_be_right(self):
    for entry, message in (
        ("gdn:width=0", "gdn: width must be at least 1, got 0"),
        ("kda:epsilon=0", "kda: epsilon must be positive"),
        ("gdn:start=0", "gdn: start must be positive"),
    ):
      with self.assertRaisesRegex(errors.UserError, message):
        one_layer.draw(entry)


class TransformersTest(absltest.TestCase):

  def _vectors(self, peer_kernel, sizes):
    """Parts of a depthwise convolution, the newest input first."""
    kernel = one_layer.array(peer_kernel)[:, 0, ::-1].T
    parts = jnp.split(kernel, np.cumsum(sizes)[:-1].tolist(), axis=1)
    return [part.reshape(len(kernel), -1, 8) for part in parts]

  def _check(self, config, params, x, want):
    got, _ = one_layer.run(config, params, one_layer.array(x), 0, "xla")
    error = float(np.abs(np.asarray(got) - want.numpy()).max())
    print(f"largest difference from transformers: {error:.1e}")
    self.assertLess(error, 1e-5)

  def test_gdn_equals_qwen3_next(self):
    try:
      import torch
      import transformers
      from transformers.models.qwen3_next import modeling_qwen3_next as peer_lib
    except ImportError:
      self.skipTest("torch or transformers is not installed: the extra bench")
    peer_config = transformers.Qwen3NextConfig(
        hidden_size=16,
        num_hidden_layers=1,
        linear_num_value_heads=4,
        linear_num_key_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention"],
    )
    peer = peer_lib.Qwen3NextGatedDeltaNet(peer_config, 0).eval()
    one_layer.random_weights(peer, torch)
    x = torch.randn(2, 9, 16)
    with torch.no_grad():
      want = peer(x)
    kernel = one_layer.kernel(peer.in_proj_qkvz, 16, 4, 32)["kernel"]
    query, key, value, gate = jnp.split(kernel, 4, axis=-1)
    rates = one_layer.kernel(peer.in_proj_ba, 16, 4, 2)["kernel"]
    convolved = self._vectors(peer.conv1d.weight, (32, 32, 32))
    params = {
        "query": {"kernel": query},
        "key": {"kernel": key},
        "value": {"kernel": value},
        "out": one_layer.kernel(peer.out_proj, 4, 8, 16),
        "gdn": {
            **dict(zip(("query", "key", "value"), convolved, strict=True)),
            "beta": rates[..., 0],
            "decay": rates[..., 1],
            "decay_log": one_layer.array(peer.A_log),
            "decay_bias": one_layer.array(peer.dt_bias),
            "gate": gate,
            "scale": one_layer.array(peer.norm.weight),
        },
    }
    epsilon = peer_config.rms_norm_eps
    config = dataclasses.replace(
        one_layer.CONFIG,
        num_kv_heads=4,
        attention=(f"gdn:epsilon={epsilon}",),
    )
    self._check(config, params, x, want)

  def test_kda_equals_kimi_linear(self):
    try:
      import torch
      import transformers
      from transformers.models.kimi_linear import (
          modeling_kimi_linear as peer_lib,
      )
    except ImportError:
      self.skipTest("torch or transformers is not installed: the extra bench")
    peer_config = transformers.KimiLinearConfig(
        hidden_size=16,
        num_hidden_layers=1,
        linear_num_heads=4,
        linear_head_dim=8,
        linear_conv_kernel_dim=4,
        layer_types=["linear_attention"],
    )
    peer = peer_lib.KimiLinearDeltaAttention(peer_config, 0).eval()
    one_layer.random_weights(peer, torch)
    x = torch.randn(2, 9, 16)
    with torch.no_grad():
      want = peer(x)
    kernel = lambda module, *shape: one_layer.kernel(module, *shape)["kernel"]
    forget = peer.forget_gate
    convolved = self._vectors(peer.conv1d.weight, (32, 32, 32))
    params = {
        "query": one_layer.kernel(peer.q_proj, 16, 4, 8),
        "key": one_layer.kernel(peer.k_proj, 16, 4, 8),
        "value": one_layer.kernel(peer.v_proj, 16, 4, 8),
        "out": one_layer.kernel(peer.o_proj, 4, 8, 16),
        "kda": {
            **dict(zip(("query", "key", "value"), convolved, strict=True)),
            "beta": kernel(peer.b_proj),
            "decay_in": kernel(forget.f_a_proj),
            "decay_out": kernel(forget.f_b_proj, 8, 4, 8),
            "decay_log": one_layer.array(forget.A_log).reshape(4),
            "decay_bias": one_layer.array(forget.dt_bias).reshape(4, 8),
            "gate_in": kernel(peer.g_a_proj),
            "gate_out": kernel(peer.g_b_proj, 8, 4, 8),
            "scale": one_layer.array(peer.o_norm.weight),
        },
    }
    epsilon = peer_config.rms_norm_eps
    config = dataclasses.replace(
        one_layer.CONFIG,
        num_kv_heads=4,
        attention=(f"kda:epsilon={epsilon}",),
    )
    self._check(config, params, x, want)


if __name__ == "__main__":
  absltest.main()
