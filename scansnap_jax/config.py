"""Every hyperparameter of the one-layer experiments, once.

A preset is a function that returns the config behind one figure of Scan & Snap
(https://arxiv.org/abs/2305.16380); flags are laid over it. The settings are
those of the paper's Section 7 and Appendix G, completed by its code: momentum
.9, and a uniform random start in the Syn-Medium runs.
"""

import array
import dataclasses
import math
from typing import Any, Literal, get_args

from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require

_PARAMETRIZATIONS = Literal["reparametrized", "original"]
_NORMALIZATIONS = Literal["l2", "none"]
_OPTIMIZERS = Literal["momentum", "sgd", "adam"]
# Rates are float32.
_SMALLEST_RATE, _LARGEST_RATE = 1e-37, 3e38


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """The generative model of sequence classes (Section 3.1 of the paper).

  Attributes:
    num_next_per_last: Next tokens that share one query (last) token.
    num_common: Common tokens that every class may draw.
    num_common_per_last: Common tokens shared by the classes of one query only;
      with num_next_per_last = 1 they are of one class, and so distinct.
    num_distinct_per_next: Distinct tokens of each next token.
    common_weight: Weight of a common token in P(l|n), before normalization.
    distinct_weight_min: Weight of the first distinct token of a class.
    distinct_weight_max: Weight of the last distinct token of a class; those of
      the tokens between first and last are equally spaced.
    seq_len: Sequence length T up to 2^24, of which T - 1 tokens are contextual.
      None is the limit of infinite length, where P(l|n) replaces counts.
    classes_file: An .npz with any P(l|n): `probs` [K, M], `query` [K], `label`
      [K] and, optionally, `class_probs` [K]. It replaces the fields above.
  """

  num_next_per_last: int = 1
  num_common: int = 10
  num_common_per_last: int = 0
  num_distinct_per_next: int = 10
  common_weight: float = 1.0
  distinct_weight_min: float = 0.1
  distinct_weight_max: float = 1.0
  seq_len: int | None = 128
  classes_file: str | None = None

  def __post_init__(self):
    require.at_least("data.num_next_per_last", self.num_next_per_last, 1)
    require.at_least("data.num_common", self.num_common, 0)
    require.at_least("data.num_common_per_last", self.num_common_per_last, 0)
    if self.classes_file is None and self.num_distinct_per_next < 1:
      raise errors.UserError(
          "data.num_distinct_per_next must be at least 1, got"
          f" {self.num_distinct_per_next}: without distinct tokens no context"
          " tells the next tokens of a query apart."
      )
    for name in ("common_weight", "distinct_weight_min", "distinct_weight_max"):
      require.positive(f"data.{name}", getattr(self, name))
    if self.seq_len is not None:
      require.at_least("data.seq_len", self.seq_len, 2)
      if self.seq_len > 2**24:
        raise errors.UserError(
            f"data.seq_len={self.seq_len}: float32 counts are exact up to"
            " 2^24 = 16777216. Use none, the limit of infinite length."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """The one-layer model and the switches that the paper discusses.

  Attributes:
    parametrization: `reparametrized` trains Y and Z (Section 3.2), `original`
      trains the embedding U and the projections W_Q, W_K, W_V.
    embed_dim: Width d of the original parametrization.
    zero_init: Start from Y = Z = 0, as the theory and Figures 4 and 5 do. False
      draws every entry from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), as Figure 6.
    normalization: `l2` divides the attended counts by their 2-norm (the paper's
      LN); `none` leaves them at 1-norm 1.
    use_residual: Add the query's embedding to the attended one, and normalize
      the sum again (Section 6).
    query_in_context: Let the query attend to itself.
  """

  parametrization: _PARAMETRIZATIONS = "reparametrized"
  embed_dim: int = 64
  zero_init: bool = True
  normalization: _NORMALIZATIONS = "l2"
  use_residual: bool = False
  query_in_context: bool = False

  def __post_init__(self):
    _require_choice(self, "model", "parametrization", _PARAMETRIZATIONS)
    _require_choice(self, "model", "normalization", _NORMALIZATIONS)
    require.at_least("model.embed_dim", self.embed_dim, 1)
    if self.parametrization == "original" and self.zero_init:
      raise errors.UserError(
          "model.zero_init=True leaves the original parametrization at a fixed"
          " point (every factor of its products is 0). Use --nomodel.zero_init."
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """The optimizer; its two learning rates are sweep axes of the experiment.

  Attributes:
    name: `momentum` is SGD with heavy-ball momentum, as in the paper's code;
      `sgd` is the plain SGD that the theory analyses.
    momentum: Heavy-ball coefficient, used by `momentum` alone.
  """

  name: _OPTIMIZERS = "momentum"
  momentum: float = 0.9

  def __post_init__(self):
    _require_choice(self, "optimizer", "name", _OPTIMIZERS)
    if not 0 <= self.momentum < 1:
      raise errors.UserError(
          f"optimizer.momentum must be in [0, 1), got {self.momentum}."
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScanSnapConfig:
  """One experiment: a sweep over data settings, learning rates and seeds.

  Attributes:
    data: The generative model.
    model: The layer.
    optimizer: The optimizer.
    num_last: Sweep axis: numbers of query (last) tokens, one data setting each.
    lr_z: Sweep axis: learning rates eta_Z of the attention logits Z.
    lr_ratio: Sweep axis: ratios eta_Y / eta_Z.
    num_seeds: Sweep axis: how many seeds. All learning rates share the data and
      initial values of a seed (common random numbers).
    first_seed: The seeds are first_seed, first_seed + 1, ...
    batch_size: Sequences per step, B.
    num_steps: Optimizer steps.
    log_every: Steps between evaluations.
    checkpoint_every: Steps between checkpoints, each taken at the evaluation
      that reaches it; the last step is always saved.
    record_attention: Keep c_n of every evaluation, for heat maps.
  """

  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  optimizer: OptimizerConfig = dataclasses.field(
      default_factory=OptimizerConfig
  )
  num_last: tuple[int, ...] = (2,)
  lr_z: tuple[float, ...] = (1.0,)
  lr_ratio: tuple[float, ...] = (1.0,)
  num_seeds: int = 10
  first_seed: int = 0
  batch_size: int = 128
  num_steps: int = 100
  log_every: int = 50
  checkpoint_every: int = 100
  record_attention: bool = False

  @property
  def num_runs(self) -> int:
    """Runs of all data settings."""
    axes = (self.num_last, self.lr_z, self.lr_ratio)
    return self.num_seeds * math.prod(len(axis) for axis in axes)

  def __post_init__(self):
    for name in ("num_last", "lr_z", "lr_ratio"):
      values = getattr(self, name)
      if not values or len(set(map(_to_float32, values))) < len(values):
        raise errors.UserError(
            f"{name} needs one or more values that differ in float32, got"
            f" {values}."
        )
      for value in values:
        require.positive(name, value)
    if min(self.lr_z) < _SMALLEST_RATE:
      raise errors.UserError(
          f"lr_z={self.lr_z} has a rate below {_SMALLEST_RATE:g}, which is 0 in"
          " float32."
      )
    largest = max(self.lr_z) * max(1.0, max(self.lr_ratio))
    if largest > _LARGEST_RATE:
      raise errors.UserError(
          f"lr_z={self.lr_z} with lr_ratio={self.lr_ratio} reaches {largest:g},"
          f" which float32 cannot hold; rates may be up to {_LARGEST_RATE:g}."
      )
    for name in ("num_seeds", "batch_size", "num_steps"):
      require.at_least(name, getattr(self, name), 1)
    for name in ("log_every", "checkpoint_every"):
      require.at_least(name, getattr(self, name), 1)
    # Far beyond what any machine runs, yet not so far that it hangs.
    for name, most in (
        ("num_seeds", 10**6),
        ("batch_size", 10**7),
        ("num_steps", 2**31 - 1),
    ):
      if getattr(self, name) > most:
        raise errors.UserError(
            f"{name} may be up to {most}, got {getattr(self, name)}."
        )
    require.seeds("first_seed", self.first_seed, self.num_seeds)
    require.memory(
        f"num_steps={self.num_steps} of {self.num_runs} runs",
        4 * self.num_runs * self.num_steps,
    )
    if self.data.classes_file is not None and len(self.num_last) > 1:
      raise errors.UserError(
          f"num_last={self.num_last} sweeps the generated data settings, but"
          f" data.classes_file={self.data.classes_file} holds one. Give either."
      )


def _to_float32(value: int | float) -> float:
  return array.array("f", [min(value, _LARGEST_RATE)])[0]


def _require_choice(config: object, prefix: str, field: str, kind: Any) -> None:
  value, choices = getattr(config, field), get_args(kind)
  if value not in choices:
    raise errors.UserError(f"{prefix}.{field}={value!r} is none of {choices}.")


def figure4() -> ScanSnapConfig:
  """Syn-Small under SGD: c_n along training at eta_Y / eta_Z = 1 and 10."""
  return ScanSnapConfig(
      lr_ratio=(1.0, 10.0),
      num_seeds=20,
      log_every=2,
      record_attention=True,
  )


def figure5() -> ScanSnapConfig:
  """Syn-Small under Adam: c_n along training at three learning rates."""
  return ScanSnapConfig(
      optimizer=OptimizerConfig(name="adam"),
      lr_z=(0.1, 0.5, 1.0),
      num_seeds=20,
      log_every=2,
      record_attention=True,
  )


def figure6() -> ScanSnapConfig:
  """Syn-Medium: final distinct-token entropy over 16 learning-rate pairs."""
  return ScanSnapConfig(
      data=DataConfig(num_next_per_last=2),
      model=ModelConfig(zero_init=False),
      num_last=(1, 3, 5, 10),
      lr_z=(0.5, 1.0, 2.0, 3.0),
      lr_ratio=(1.0, 2.0, 5.0, 10.0),
  )


def figure11() -> ScanSnapConfig:
  """Figure 6's runs, read as recall of distinct tokens, by eta_Z."""
  return dataclasses.replace(figure6(), lr_ratio=(1.0,))


def figure12() -> ScanSnapConfig:
  """Figure 6's runs, read as recall of distinct tokens, by eta_Y / eta_Z."""
  return dataclasses.replace(figure6(), lr_z=(1.0,))


def smoke() -> ScanSnapConfig:
  """A sweep that takes seconds, at a size at which numbers mean nothing."""
  return ScanSnapConfig(
      data=DataConfig(seq_len=9),
      num_last=(2,),
      lr_z=(1.0,),
      lr_ratio=(2.0,),
      num_seeds=2,
      batch_size=4,
      num_steps=2,
      log_every=2,
  )
