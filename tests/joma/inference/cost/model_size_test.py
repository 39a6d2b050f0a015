"""The formula of parameter counts against real initializations."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp

from joma.inference.cost import model_size
from joma.transformer import config as configs
from joma.transformer import model as models

# Primes, so that a product of wrong sizes does not come out right.
_SIZES = dict(
    vocab_size=53,
    num_layers=3,
    embed_dim=22,
    num_heads=6,
    num_kv_heads=2,
    head_dim=10,
    hidden_dim=31,
    max_len=17,
)
_BIASES = dict(use_qkv_bias=True, use_attn_out_bias=True, use_mlp_bias=True)
_FAMILIES = {
    "llama_tied": {},
    "llama_untied": dict(tie_embeddings=False),
    "gpt2": dict(
        norm="layer_norm",
        positions="learned",
        activation="gelu_tanh",
        use_gated_mlp=False,
        num_kv_heads=6,
        **_BIASES,
    ),
    "opt_350m": dict(
        norm="layer_norm",
        norm_placement="post",
        use_final_norm=False,
        positions="learned",
        position_offset=2,
        activation="relu",
        use_gated_mlp=False,
        embed_proj_dim=7,
        **_BIASES,
    ),
    "neox": dict(
        norm="layer_norm",
        use_parallel_residual=True,
        rotary_fraction=0.4,
        use_gated_mlp=False,
        tie_embeddings=False,
        use_output_bias=True,
        **_BIASES,
    ),
    "qwen2": dict(use_qkv_bias=True, num_kv_heads=1),
    "qwen3": dict(use_qk_norm=True),
    "gemma": dict(norm_placement="sandwich", use_qk_norm=True),
    "projected_untied": dict(
        embed_proj_dim=7, tie_embeddings=False, use_output_bias=True
    ),
    "tied_with_a_bias_that_is_none": dict(use_output_bias=True),
}


class ModelSizeTest(parameterized.TestCase):

  @parameterized.named_parameters((name, name) for name in _FAMILIES)
  def test_total_is_that_of_an_initialization(self, name):
    config = configs.TransformerConfig(**_SIZES | _FAMILIES[name])
    made = jax.eval_shape(
        models.Transformer(config).init,
        jax.random.key(0),
        jnp.zeros((1, 4), jnp.int32),
    )
    expected = sum(leaf.size for leaf in jax.tree.leaves(made["params"]))
    self.assertEqual(model_size.count(config).total, expected)

  def test_parts_are_those_of_an_initialization(self):
    config = configs.TransformerConfig(**_SIZES | _FAMILIES["neox"])
    made = jax.eval_shape(
        models.Transformer(config).init,
        jax.random.key(0),
        jnp.zeros((1, 4), jnp.int32),
    )["params"]
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    layers = [made[f"layers_{layer}"] for layer in range(3)]
    of = lambda *names: sum(
        size(layer["attn"][n]) for layer in layers for n in names
    )
    counted = model_size.count(config)
    self.assertEqual(counted.query_out, of("query", "out"))
    self.assertEqual(counted.key_value, of("key", "value"))
    self.assertEqual(counted.mlp, sum(size(layer["mlp"]) for layer in layers))
    self.assertEqual(counted.lookup, size(made["token_embed"]))
    self.assertEqual(counted.output, size(made["output"]))


if __name__ == "__main__":
  absltest.main()
