"""Gates of the heads' outputs, beside plain attention and transformers."""

import dataclasses

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from scansnap_jax.experiment import errors
from tests.joma.systems import one_layer


class GatedAttentionTest(parameterized.TestCase):

  @parameterized.parameters(("", 8), (":per_head=true", 1))
  def test_a_gate_is_a_sigmoid_of_the_input(self, options, width):
    config, params, x = one_layer.draw(f"gated_attention{options}")
    own = np.asarray(params["gated_attention"]["kernel"])
    self.assertEqual(own.shape, (16, 4, width))
    plain = one_layer.head_out(one_layer.CONFIG, params, x)
    opening = np.einsum("BTD,DNH->BTNH", np.asarray(x), own)
    got = one_layer.head_out(config, params, x)
    np.testing.assert_allclose(got, plain / (1 + np.exp(-opening)), atol=1e-6)
    self.assertGreater(np.abs(got - plain / 2).max(), 0.1)

  def test_weights_of_zero_are_half_of_plain_attention(self):
    config, params, x = one_layer.draw("gated_attention:start=0")
    plain = one_layer.head_out(one_layer.CONFIG, params, x)
    # To the bit: a half is a power of 2.
    np.testing.assert_array_equal(
        one_layer.head_out(config, params, x), plain / 2
    )

  def test_says_what_would_be_right(self):
    with self.assertRaisesRegex(errors.UserError, "not negative, got -1.0"):
      one_layer.draw("gated_attention:start=-1")


class TransformersTest(absltest.TestCase):

  def test_equals_eager_qwen3_next(self):
    """The attention alone, on the same weights: a gate of each output."""
    try:
      import torch
      import transformers
      from transformers.models.qwen3_next import modeling_qwen3_next as peer_lib
    except ImportError:
      self.skipTest("torch or transformers is not installed: the extra bench")
    peer_config = transformers.Qwen3NextConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        layer_types=["full_attention"],
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.5,
        },
        attn_implementation="eager",
    )
    peer = peer_lib.Qwen3NextAttention(peer_config, layer_idx=0).eval()
    one_layer.random_weights(peer, torch)
    turn = peer_lib.Qwen3NextRotaryEmbedding(peer_config)
    x = torch.randn(2, 9, 16)
    with torch.no_grad():
      places = torch.arange(9)[None].expand(2, 9)
      want, _ = peer(x, turn(x, places), torch.tensor(one_layer.causal(9)))
    config = dataclasses.replace(
        one_layer.CONFIG,
        rotary_fraction=0.5,
        use_qk_norm=True,
        norm_epsilon=peer_config.rms_norm_eps,
        norm_scale_offset=1.0,
        attention=("gated_attention",),
    )
    # A head's query, then its gate.
    both = one_layer.kernel(peer.q_proj, 16, 4, 16)["kernel"]
    params = {
        "query": {"kernel": both[..., :8]},
        "key": one_layer.kernel(peer.k_proj, 16, 2, 8),
        "value": one_layer.kernel(peer.v_proj, 16, 2, 8),
        "query_norm": {"scale": one_layer.array(peer.q_norm.weight)},
        "key_norm": {"scale": one_layer.array(peer.k_norm.weight)},
        "out": one_layer.kernel(peer.o_proj, 4, 8, 16),
        "gated_attention": {"kernel": both[..., 8:]},
    }
    got, _ = one_layer.run(config, params, one_layer.array(x))
    error = float(np.abs(np.asarray(got) - want.numpy()).max())
    print(f"largest difference from transformers: {error:.1e}")
    self.assertLess(error, 1e-5)


if __name__ == "__main__":
  absltest.main()
