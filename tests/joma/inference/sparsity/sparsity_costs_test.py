"""Tests of what a sparse step reads, against counts of arrays."""

import dataclasses

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.inference.sparsity import contextual_config
from joma.inference.sparsity import predictors
from joma.inference.sparsity import sparsity_costs as costs
from joma.inference.sparsity import unit_rules
from joma.transformer import config as configs
from joma.transformer import model as models

_MODEL = configs.TransformerConfig(
    vocab_size=11,
    num_layers=2,
    embed_dim=8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    hidden_dim=12,
)


def _weights(config):
  """Numbers of every matrix, as the model makes them."""
  params = jax.eval_shape(
      models.Transformer(config).init,
      jax.random.key(0),
      jnp.zeros((1, 2), jnp.int32),
  )["params"]
  return params, sum(leaf.size for leaf in jax.tree.leaves(params))


class SharesTest(parameterized.TestCase):

  @pytest.mark.slow
  def test_neurons_and_predictor_as_arrays_are(self):
    params, total = _weights(_MODEL)
    mlp = sum(x.size for x in jax.tree.leaves(params["layers_0"]["mlp"]))
    config = contextual_config.PredictorConfig(rank=3, head_rank=2)
    learned = predictors.init(config, 2, 8, 6, 4)
    size = sum(leaf.size for leaf in jax.tree.leaves(learned["mlp"])) / 2
    rule = unit_rules.Predicted(rank=3, num_units=6)
    kept = [unit_rules.Kept(0.5), unit_rules.Kept(0.25)]
    found = costs.shares(_MODEL, rule, kept)
    read = 0.75 * mlp + 2 * size
    self.assertAlmostEqual(found.mlp, read / (2 * mlp))
    self.assertAlmostEqual(found.weights, (total - 2 * mlp + read) / total)
    self.assertEqual(found.weights, found.flops)

  @parameterized.parameters(True, False)
  def test_thresholds_read_what_they_look_at(self, is_gated):
    config = dataclasses.replace(_MODEL, use_gated_mlp=is_gated)
    matrix, inner = 8 * 12, 2 if is_gated else 1
    kept = [unit_rules.Kept(0.25, 0.5)] * 2
    cats = costs.shares(config, unit_rules.Cats(), kept).mlp
    teal = costs.shares(config, unit_rules.Teal(), kept).mlp
    dense = (inner + 1) * matrix
    # One matrix whole, the others by a quarter.
    self.assertAlmostEqual(cats, (matrix + 0.25 * inner * matrix) / dense)
    self.assertAlmostEqual(teal, (inner * 0.5 + 0.25) * matrix / dense)

  def test_heads_by_rule(self):
    params, total = _weights(_MODEL)
    attn = params["layers_0"]["attn"]
    query_out = attn["query"]["kernel"].size + attn["out"]["kernel"].size
    key_value = attn["key"]["kernel"].size + attn["value"]["kernel"].size
    kept = [costs.KeptHeads(0.25, 0.5)] * 2
    for missing_kv, read_kv, times in (
        ("always_compute_kv", 1, 1),
        ("zero", 0.5, 1),
        # Of 4 steps one computes all; each has its own and 4 kept tokens.
        ("recompute", (3 * 0.5 + 1) / 4, 5),
    ):
      rule = unit_rules.HeadRule(
          chosen_by="oracle", missing_kv=missing_kv, period=4
      )
      found = costs.shares(_MODEL, None, (), rule, kept)
      rest = total - 2 * (query_out + key_value)
      read = 2 * (0.25 * query_out + read_kv * key_value)
      made = 2 * (0.25 * query_out + read_kv * times * key_value)
      self.assertAlmostEqual(found.weights, (rest + read) / total)
      self.assertAlmostEqual(found.flops, (rest + made) / total)

  def test_predicted_heads_read_their_predictor_too(self):
    _, total = _weights(_MODEL)
    config = contextual_config.PredictorConfig(rank=3, head_rank=2)
    learned = predictors.init(config, 2, 8, 6, 4)
    size = sum(leaf.size for leaf in jax.tree.leaves(learned["heads"]))
    oracle = unit_rules.HeadRule(chosen_by="oracle", missing_kv="zero", rank=2)
    predicted = dataclasses.replace(oracle, chosen_by="predicted")
    kept = [costs.KeptHeads(0.25, 0.5)] * 2
    found = costs.shares(_MODEL, None, (), predicted, kept)
    known = costs.shares(_MODEL, None, (), oracle, kept)
    self.assertAlmostEqual(found.weights, known.weights + size / total)
    self.assertAlmostEqual(found.flops, known.flops + size / total)

  def test_all_is_the_dense_model(self):
    kept = [unit_rules.Kept(1.0)] * 2
    for rule in (unit_rules.Griffin(), unit_rules.Cats(), unit_rules.Teal()):
      found = costs.shares(_MODEL, rule, kept)
      np.testing.assert_allclose(found, 1, rtol=1e-12)


if __name__ == "__main__":
  absltest.main()
