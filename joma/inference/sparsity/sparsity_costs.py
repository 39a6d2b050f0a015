"""What a decode step reads when it leaves out neurons and heads.

  share = (all weights - MLPs - heads' projections + what is read of both
           + predictors) / all weights

of the weights that a dense step reads once whatever the batch; caches and
activations are not counted, and a weight is a byte or several alike. At batch 1
a weight that is read is multiplied once, so the share of FLOPs is the same but
for `recompute`, which projects kept inputs again.

Letters: L layers, D width, F neurons, N heads, K KV heads, H size of a head, R
kept inputs.
"""

from collections.abc import Sequence
from typing import NamedTuple

from joma.inference.cost import model_size
from joma.inference.sparsity import unit_rules
from joma.transformer import config as configs


class Shares(NamedTuple):
  """Of what a dense step has.

  Attributes:
    mlp: Weights read for the MLPs, predictors of neurons included.
    weights: All weights read.
    flops: Multiplications with weights, at batch 1.
  """

  mlp: float
  weights: float
  flops: float


class KeptHeads(NamedTuple):
  """Shares of a layer's query heads and KV heads that a token chooses."""

  query: float
  kv: float


def shares(
    config: configs.TransformerConfig,
    rule: unit_rules.UnitRule | None,
    kept: Sequence[unit_rules.Kept],
    head_rule: unit_rules.HeadRule | None = None,
    kept_heads: Sequence[KeptHeads] = (),
) -> Shares:
  """Counts a step.

  Args:
    config: The model's.
    rule: Of the neurons; None computes all.
    kept: What it kept, of each layer; unused without a rule.
    head_rule: Of the heads; None computes all.
    kept_heads: What it kept, of each layer.
  """
  size = model_size.count(config)
  mlp = float(size.mlp)
  if rule is not None:
    shape = mlp_shape(config)
    dense = config.num_layers * shape.weights
    read = sum(rule.weights_read(shape, layer) for layer in kept)
    mlp += read - dense
  extra, extra_flops = 0.0, 0.0
  if head_rule is not None:
    for layer in kept_heads:
      read, flops = _heads(config, head_rule, layer)
      extra, extra_flops = extra + read, extra_flops + flops
  rest = size.multiplied - size.mlp + mlp
  return Shares(
      mlp=mlp / size.mlp,
      weights=(rest + extra) / size.multiplied,
      flops=(rest + extra_flops) / size.multiplied,
  )


def mlp_shape(config: configs.TransformerConfig) -> unit_rules.MlpShape:
  """Sizes of a model's MLPs."""
  num_inner = 2 if config.use_gated_mlp else 1
  return unit_rules.MlpShape(config.embed_dim, config.hidden_dim, num_inner)


def _heads(
    config: configs.TransformerConfig,
    rule: unit_rules.HeadRule,
    kept: KeptHeads,
) -> tuple[float, float]:
  """Weights read and multiplied beyond a dense layer's; mostly negative."""
  head = config.head_dim * config.embed_dim
  query_out = 2 * config.num_heads * head
  key_value = 2 * config.num_kv_heads * head
  predictor = 0
  if rule.chosen_by == "predicted":
    rank, num = rule.rank, config.num_heads
    predictor = rank * (config.embed_dim + num) + num
  saved = predictor - (1 - kept.query) * query_out
  if rule.missing_kv == "always_compute_kv":
    return saved, saved
  if rule.missing_kv == "zero":
    saved -= (1 - kept.kv) * key_value
    return saved, saved
  # One step in R computes all; each projects its own token and R kept inputs.
  read = (kept.kv * (rule.period - 1) + 1) / rule.period
  return (
      saved - (1 - read) * key_value,
      saved + (read * (rule.period + 1) - 1) * key_value,
  )
