"""How many parameters a model has, by what a decode step does with them.

Counted from the config alone: no array is made, and no jax is imported for a
model without attention systems.

Letters: V vocabulary, D width, F hidden width, N query heads, K key and value
heads, H head size.
"""

import dataclasses

from joma.inference.cost import system_costs
from joma.transformer import config as configs


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSize:
  """Numbers of parameters, all layers together.

  Attributes:
    lookup: Tables of which a token reads one row each: an embedding that is
      not the output layer too, and learned positions.
    query_out: Query and output projections of attention, with biases.
    key_value: Key and value projections, with biases.
    mlp: Every matrix and bias of the MLPs.
    norms: Scales and biases of norms.
    output: The output layer, be it the embedding or its own, and projections
      between it, the embedding and the residual stream.
    systems: Parameters of attention systems.
  """

  lookup: int
  query_out: int
  key_value: int
  mlp: int
  norms: int
  output: int
  systems: int = 0

  @property
  def total(self) -> int:
    """All parameters."""
    return self.lookup + self.multiplied

  @property
  def multiplied(self) -> int:
    """Those that every step reads whole: all but the tables."""
    attention = self.query_out + self.key_value
    return attention + self.mlp + self.norms + self.output + self.systems


def count(config: configs.TransformerConfig) -> ModelSize:
  """Counts the parameters of `model.Transformer(config)`."""
  width, head_dim = config.embed_dim, config.head_dim
  matrix = lambda *sides: _matrix(config, "attn", *sides)
  into = lambda num_heads: (
      matrix(width, num_heads * head_dim)
      + config.use_qkv_bias * num_heads * head_dim
  )
  out = matrix(config.num_heads * head_dim, width)
  out += config.use_attn_out_bias * width
  layers = config.num_layers
  return ModelSize(
      lookup=_lookup(config),
      query_out=layers * (into(config.num_heads) + out),
      key_value=layers * 2 * into(config.num_kv_heads),
      mlp=layers * _mlp(config),
      norms=_norms(config),
      output=_output(config),
      systems=system_costs.num_params(config),
  )


def _matrix(
    config: configs.TransformerConfig, part: str, num_in: int, num_out: int
) -> int:
  """Numbers of a matrix of a layer, each of which is multiplied once."""
  sizes = config.monarch
  if sizes is None or not sizes.is_of(part):
    return num_in * num_out
  return sizes.num_params(num_in, num_out)


def _lookup(config: configs.TransformerConfig) -> int:
  rows = 0
  if config.positions == "learned":
    rows = config.max_len + config.position_offset
  embedding = 0 if config.tie_embeddings else _embedding(config)
  return rows * config.embed_dim + embedding


def _embedding(config: configs.TransformerConfig) -> int:
  return config.vocab_size * (config.embed_proj_dim or config.embed_dim)


def _mlp(config: configs.TransformerConfig) -> int:
  width, hidden = config.embed_dim, config.hidden_dim
  matrix = _matrix(config, "mlp", width, hidden)
  num_lower, bias = 1 + config.use_gated_mlp, config.use_mlp_bias
  return (num_lower + 1) * matrix + bias * (num_lower * hidden + width)


def _norms(config: configs.TransformerConfig) -> int:
  sandwich = config.norm_placement == "sandwich"
  num_norms = config.num_layers * (4 if sandwich else 2)
  num_norms += config.use_final_norm
  per_norm = config.embed_dim * (2 if config.norm == "layer_norm" else 1)
  # Queries and keys have RMSNorms, scales alone.
  per_head = 2 * config.head_dim if config.use_qk_norm else 0
  return num_norms * per_norm + config.num_layers * per_head


def _output(config: configs.TransformerConfig) -> int:
  layer = _embedding(config)
  if not config.tie_embeddings and config.use_output_bias:
    layer += config.vocab_size
  if config.embed_proj_dim is None:
    return layer
  return layer + 2 * config.embed_proj_dim * config.embed_dim
