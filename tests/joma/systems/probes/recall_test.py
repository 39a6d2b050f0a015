"""Parts of the logits: their sum is the model's, one head's by a plain loop."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from joma.systems.probes import recall
from joma.transformer import config as configs
from joma.transformer import model as models
from scansnap_jax.experiment import errors
from tests.joma.transformer import applied

_TOKENS = np.random.default_rng(0).integers(0, 11, (3, 5)).astype(np.int32)
_AT = np.array([4, 2, 0], np.int32)


def _config(**changes):
  sizes = dict(vocab_size=11, num_layers=2, embed_dim=8, num_heads=4)
  sizes |= dict(num_kv_heads=2, head_dim=4, hidden_dim=12, max_len=8)
  return configs.TransformerConfig(**sizes | changes)


def _apart(config):
  model = models.Transformer(config, implementation="reference")
  params = applied.params(model)
  logits, seen = jax.jit(
      lambda params, tokens: model.apply(
          {"params": params}, tokens, mutable="intermediates"
      )
  )(params, _TOKENS)
  written = recall.writes(params, config, seen, jnp.asarray(_AT))
  return params, np.asarray(logits)[np.arange(3), _AT], written


class WritesTest(parameterized.TestCase):

  @parameterized.parameters(
      dict(),
      dict(
          norm="layer_norm",
          tie_embeddings=False,
          use_output_bias=True,
          use_attn_out_bias=True,
          use_mlp_bias=True,
          use_gated_mlp=False,
          use_parallel_residual=True,
          positions="learned",
      ),
      dict(norm_scale_offset=1.0, embed_scale=3.0, use_final_norm=False),
      dict(norm_scale_offset=1.0, attention=("gated_attention",)),
  )
  def test_parts_add_up_to_the_logits(self, **changes):
    config = _config(**changes)
    params, logits, written = _apart(config)
    total, found = written.total(), 0.0
    for part in (
        written.embed,
        written.heads.sum(axis=(1, 2)),
        jnp.broadcast_to(written.attn_bias.sum(axis=0)[None], (3, 8)),
        written.mlp.sum(axis=1),
    ):
      found += np.asarray(recall.to_logits(params, config, part, total))
    found += np.asarray(recall.constant(params, config))
    # The bound, in float32; logits are some units large.
    np.testing.assert_allclose(found, logits, atol=1e-4)

  def test_a_head_adds_what_its_rows_of_the_output_projection_make(self):
    config = _config(norm="layer_norm")
    params, _, written = _apart(config)
    found = recall.to_logits(params, config, written.heads, written.total())
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    for text in range(3):
      total = np.float64(written.total()[text])
      apart = total - total.mean()
      size = np.sqrt((apart * apart).mean() + config.norm_epsilon)
      head = np.float64(written.heads[text, 1, 3])
      wanted = (head - head.mean()) / size * p["final_norm"]["scale"]
      wanted = p["token_embed"]["embedding"] @ wanted
      np.testing.assert_allclose(found[text, 1, 3], wanted, atol=1e-5)

  def test_layers_that_run_in_a_loop_are_refused(self):
    config = _config(scan_layers=True)
    with self.assertRaisesRegex(errors.UserError, "use scanning.unrolled"):
      recall.writes({}, config, {"intermediates": {}}, jnp.asarray(_AT))

  @parameterized.parameters(
      (dict(norm_placement="sandwich"), "norm_placement is 'sandwich'"),
      (dict(output_logits_soft_cap=3.0), "output_logits_soft_cap is None"),
  )
  def test_what_is_no_sum_is_refused(self, changes, message):
    config = _config(**changes)
    with self.assertRaisesRegex(errors.UserError, message):
      params, _, written = _apart(config)
      recall.to_logits(params, config, written.embed, written.total())


class RegressTest(absltest.TestCase):

  def test_a_planted_sum_is_found(self):
    draw = np.random.default_rng(0)
    heads = draw.normal(size=(20, 3, 6))
    weights, bias = np.array([0.5, -2.0, 0.0]), draw.normal(size=6)
    mlp = np.einsum("bnd,n->bd", heads, weights) + bias
    found = recall.regress(mlp, heads)
    np.testing.assert_allclose(found.weights, weights, atol=1e-12)
    np.testing.assert_allclose(found.bias, bias, atol=1e-12)
    self.assertAlmostEqual(found.r2, 1.0)
    # Noise of the variance of the sum leaves half, and chance a little more.
    noise = draw.normal(size=mlp.shape) * np.sqrt(4.25)
    self.assertBetween(recall.regress(mlp + noise, heads).r2, 0.4, 0.65)

  def test_the_constant_alone_explains_no_variance(self):
    draw = np.random.default_rng(1)
    mlp = 100.0 + draw.normal(size=(400, 6))
    r2 = recall.regress(mlp, draw.normal(size=(400, 2, 6))).r2
    self.assertBetween(r2, 0.0, 0.02)


if __name__ == "__main__":
  absltest.main()
