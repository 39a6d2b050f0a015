"""What a Transformer leaves out, and what is known of a layer that does."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from jaxtyping import Array, Bool, Int

from joma.inference.sparsity import contextual_config
from joma.inference.sparsity import unit_rules
from joma.transformer import config as configs


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparsityPlan:
  """What is left out; static.

  Attributes:
    mlp: Rule of the neurons; None computes all.
    heads: Rule of the heads; None computes all.
    block_size: Neurons of a block.
    lookahead: As in `predictors.PredictorConfig`.
    is_shared: Whether the sequences of a batch share one list of blocks when
      they decode, that of the highest scores among them.
    prompt_len: Tokens of each text that are dense when measured.
    label: Which neurons count, for measures.
    num_positive: How many blocks count, unless `label` is sign; None is as many
      as the rule chooses, or all.
    num_positive_heads: How many heads count; None is likewise.
  """

  mlp: Any = None
  heads: unit_rules.HeadRule | None = None
  block_size: int = 1
  lookahead: int = 0
  is_shared: bool = False
  prompt_len: int = 0
  label: contextual_config.Label = "contribution"
  num_positive: int | None = None
  num_positive_heads: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanCall:
  """One call of one layer under a plan.

  Attributes:
    config: The model's.
    plan: What is left out.
    dtype: Of the model's products.
    layer: Which, from 0.
    arrays: What the layer's rules have learned, see `contextual_sparsity`.
    positions: Of the tokens [B, T]; -1 marks padding.
    is_prompt: Which tokens are dense when they are measured [B, T].
  """

  config: configs.TransformerConfig
  plan: SparsityPlan
  dtype: Any
  layer: int
  arrays: Mapping[str, Any]
  positions: Int[Array, "B T"]
  is_prompt: Bool[Array, "B T"]
