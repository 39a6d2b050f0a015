"""Every setting of the studies of open questions, once.

One frozen dataclass a study (`studies`). Imports no jax, so that command lines
answer at once.
"""

import dataclasses
import math

from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class BounceConfig:
  """Does attention entropy fall, then rise, below a nonlinear MLP?

  Attributes:
    num_seeds: Runs of each setting.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    num_classes: Number of classes K.
    num_distinct: Distinct tokens of each class; no others.
    hidden_dim: Hidden nodes.
    num_samples: Samples of the data set, as many of each class.
    noise: Standard deviation of each coordinate of the isotropic mixture.
    seq_len: Tokens of a sequence, for the data that are frequencies.
    step_size: Learning rate of W and z under the cross-entropy.
    stationary_step_size: Learning rate of W and z under the stationary loss,
      which bursts.
    max_attn_logit: Attention logit at which a run stops.
    num_steps: Number of training steps.
    num_records: Measurements after the first one.
    min_rise: Rise of the entropy, in nats, that counts as a bounce.
  """

  num_seeds: int = 5
  first_seed: int = 0
  num_classes: int = 4
  num_distinct: int = 6
  hidden_dim: int = 16
  num_samples: int = 768
  noise: float = 0.1
  seq_len: int = 32
  step_size: float = 0.75
  stationary_step_size: float = 0.075
  max_attn_logit: float = 5.0
  num_steps: int = 1000
  num_records: int = 100
  min_rise: float = 0.01

  def __post_init__(self):
    _check_runs(self)
    for name in ("num_classes", "num_distinct", "hidden_dim", "seq_len"):
      require.at_least(name, getattr(self, name), 1)
    require.at_least("num_samples", self.num_samples, self.num_classes)
    for name in (
        "noise",
        "step_size",
        "stationary_step_size",
        "max_attn_logit",
        "min_rise",
    ):
      require.positive(name, getattr(self, name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearControlConfig:
  """Does a linear MLP bounce as well, and what makes it?

  Attributes:
    num_seeds: Runs of each setting.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    num_classes: Number of classes K.
    num_distinct: Distinct tokens of each class; no others.
    hidden_dim: Hidden nodes.
    num_samples: Samples of the data set, as many of each class.
    noises: Standard deviations of the isotropic mixture; two or more.
    step_size: Learning rate of W and z under the cross-entropy.
    stationary_step_size: Learning rate of W and z under the stationary loss,
      which bursts.
    max_attn_logit: Attention logit at which a run stops.
    num_steps: Number of training steps.
    num_records: Measurements after the first one.
    min_rise: Rise of the entropy, in nats, that counts as a bounce.
  """

  num_seeds: int = 5
  first_seed: int = 0
  num_classes: int = 4
  num_distinct: int = 6
  hidden_dim: int = 16
  num_samples: int = 768
  noises: tuple[float, ...] = (0.03, 0.06, 0.1, 0.15, 0.25)
  step_size: float = 0.75
  stationary_step_size: float = 0.075
  max_attn_logit: float = 5.0
  num_steps: int = 1000
  num_records: int = 100
  min_rise: float = 0.01

  def __post_init__(self):
    _check_runs(self)
    for name in ("num_classes", "num_distinct", "hidden_dim"):
      require.at_least(name, getattr(self, name), 1)
    require.at_least("num_samples", self.num_samples, self.num_classes)
    _require_several("noises", self.noises)
    for name in (
        "step_size",
        "stationary_step_size",
        "max_attn_logit",
        "min_rise",
    ):
      require.positive(name, getattr(self, name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class JointInvariantConfig:
  """Theorem 1 under softmax attention, ReLU and joint training.

  Attributes:
    num_seeds: Runs of each setting.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    num_classes: Number of classes K, each with one fixed context.
    hidden_dim: Hidden nodes.
    step_size: Learning rate of all that is trained; runs at half of it measure
      what the finite step costs.
    embedding_step_size: Learning rate of runs whose embeddings train, which
      move faster.
    num_steps: Number of steps, even; runs at half the learning rate take as
      many.
    num_records: Measurements after the first one, even.
  """

  num_seeds: int = 5
  first_seed: int = 0
  num_classes: int = 20
  hidden_dim: int = 32
  step_size: float = 0.15
  embedding_step_size: float = 0.03
  num_steps: int = 2400
  num_records: int = 40

  def __post_init__(self):
    _check_runs(self)
    for name in ("num_classes", "hidden_dim"):
      require.at_least(name, getattr(self, name), 2)
    for name in ("num_steps", "num_records"):
      if getattr(self, name) % 2:
        raise errors.UserError(
            f"{name} must be even, got {getattr(self, name)}."
        )
    for name in ("step_size", "embedding_step_size"):
      require.positive(name, getattr(self, name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DriftConfig:
  """Does the drift of b-bar explain the error of the softmax invariant?

  Attributes:
    num_seeds: Runs of each setting.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    num_classes: Number of classes K, each with one fixed context.
    hidden_dim: Hidden nodes.
    step_size: Learning rate of W and z.
    num_steps: Number of training steps.
    num_records: Measurements after the first one.
  """

  num_seeds: int = 10
  first_seed: int = 0
  num_classes: int = 20
  hidden_dim: int = 32
  step_size: float = 0.5
  num_steps: int = 2000
  num_records: int = 100

  def __post_init__(self):
    _check_runs(self)
    for name in ("num_classes", "hidden_dim"):
      require.at_least(name, getattr(self, name), 2)
    require.positive("step_size", self.step_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResidualConfig:
  """What does the query's residual change?

  Attributes:
    num_seeds: Runs of each setting.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    num_classes: Number of classes K, each with one fixed context under every
      query.
    num_queries: Number of queries Q, two or more.
    hidden_dim: Hidden nodes.
    step_size: Learning rate of all that is trained.
    num_steps: Number of training steps.
    num_records: Measurements after the first one.
  """

  num_seeds: int = 5
  first_seed: int = 0
  num_classes: int = 10
  num_queries: int = 3
  hidden_dim: int = 32
  step_size: float = 0.2
  num_steps: int = 2400
  num_records: int = 40

  def __post_init__(self):
    _check_runs(self)
    for name in ("num_classes", "num_queries", "hidden_dim"):
      require.at_least(name, getattr(self, name), 2)
    require.positive("step_size", self.step_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoLayerHbltConfig:
  """Do the layers of a stack find the latents of a tree from the bottom up?

  Attributes:
    num_seeds: Runs of each setting.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    num_classes: Number of classes D of the root.
    num_roots: Nodes right under the root, even.
    branching: Children of a node, for each depth but the last.
    polarity: rho of the edges, in (0, 1], but for every second leaf.
    weak_polarity: rho of the edge above every second leaf, in [0, 1], which
      gives attention something to learn.
    hidden_dim: Hidden nodes of either layer.
    batch_size: Samples of a step.
    num_held_out: Samples that scores are measured on.
    step_size: Learning rate of Adam.
    num_steps: Number of training steps.
    num_records: Measurements after the first one, a multiple of num_scores.
    num_scores: How often the nodes are held against the latents.
  """

  num_seeds: int = 5
  first_seed: int = 0
  num_classes: int = 8
  num_roots: int = 6
  branching: tuple[int, ...] = (3, 4)
  polarity: float = 0.9
  weak_polarity: float = 0.2
  hidden_dim: int = 32
  batch_size: int = 128
  num_held_out: int = 2048
  step_size: float = 0.01
  num_steps: int = 1000
  num_records: int = 20
  num_scores: int = 5

  def __post_init__(self):
    _check_runs(self)
    _check_tree(self)
    require.at_least("num_scores", self.num_scores, 1)
    if self.num_records % self.num_scores:
      raise errors.UserError(
          f"num_records must be a multiple of num_scores={self.num_scores},"
          f" got {self.num_records}."
      )
    if not 0 < self.polarity <= 1:
      raise errors.UserError(
          f"polarity must lie in (0, 1], got {self.polarity}."
      )
    if not 0 <= self.weak_polarity <= 1:
      raise errors.UserError(
          f"weak_polarity must lie in [0, 1], got {self.weak_polarity}."
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoisyHbltConfig:
  """How does noise in the tree change what hidden nodes find?

  Attributes:
    num_seeds: Runs of each setting.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    num_classes: Number of classes D of the root.
    num_roots: Nodes right under the root, even.
    branching: Children of a node, for each depth but the last.
    polarities: rho of every edge, each in (0, 1]; two or more.
    hidden_dim: Hidden nodes of either layer.
    batch_size: Samples of a step.
    num_held_out: Samples that scores are measured on.
    step_size: Learning rate of Adam.
    num_steps: Number of training steps.
    num_records: Measurements after the first one.
  """

  num_seeds: int = 5
  first_seed: int = 0
  num_classes: int = 8
  num_roots: int = 6
  branching: tuple[int, ...] = (3, 3)
  polarities: tuple[float, ...] = (0.4, 0.6, 0.8, 0.9, 1.0)
  hidden_dim: int = 32
  batch_size: int = 128
  num_held_out: int = 2048
  step_size: float = 0.01
  num_steps: int = 400
  num_records: int = 4

  def __post_init__(self):
    _check_runs(self)
    _check_tree(self)
    _require_several("polarities", self.polarities)
    if max(self.polarities) > 1:
      raise errors.UserError(
          f"polarities must lie in (0, 1], got {self.polarities}."
      )


def _check_runs(config) -> None:
  # Intervals over seeds need two.
  require.at_least("num_seeds", config.num_seeds, 2)
  require.at_least("first_seed", config.first_seed, 0)
  require.at_least("num_records", config.num_records, 1)
  if config.num_steps < 1 or config.num_steps % config.num_records:
    raise errors.UserError(
        f"num_steps must be a multiple of num_records={config.num_records},"
        f" got {config.num_steps}."
    )


def _check_tree(config) -> None:
  for name in ("num_classes", "hidden_dim", "batch_size", "num_held_out"):
    require.at_least(name, getattr(config, name), 2)
  if config.num_roots < 2 or config.num_roots % 2:
    raise errors.UserError(
        f"num_roots must be even and at least 2, got {config.num_roots}."
    )
  most = math.comb(config.num_roots, config.num_roots // 2)
  if config.num_classes > most:
    raise errors.UserError(
        f"num_classes may be up to {most} for num_roots={config.num_roots},"
        f" got {config.num_classes}."
    )
  if not config.branching or min(config.branching) < 1:
    raise errors.UserError(
        f"branching needs one or more positive values, got {config.branching}."
    )
  require.positive("step_size", config.step_size)


def _require_several(name: str, values: tuple[float, ...]) -> None:
  if len(set(values)) < 2 or len(set(values)) < len(values):
    raise errors.UserError(
        f"{name} needs two or more different values, got {values}."
    )
  for value in values:
    require.positive(name, value)
