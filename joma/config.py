"""Every setting of the studies of joint dynamics, once.

One frozen dataclass a study (`studies`), with the symbols of JoMA
(https://arxiv.org/abs/2310.00535) and, as defaults, the settings of its figures
or of the docs. Imports no jax, so that command lines answer at once.
"""

from collections.abc import Iterable
import dataclasses
import math

from joma.theory import published
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure2Config:
  """Theorem 1 along training (Figure 2): class-conditional contexts.

  Attributes:
    num_seeds: Runs of either mode; each draws contexts and initial values.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    num_steps: Full-batch steps.
    record_every: Steps between measurements; divides num_steps.
    step_size: Learning rate of W and z.
    temperature: T of softmax attention.
  """

  num_seeds: int = 10
  first_seed: int = 0
  num_steps: int = 2000
  record_every: int = 20
  step_size: float = 0.1
  temperature: float = 0.5

  def __post_init__(self):
    _require_seeds(self.first_seed, self.num_seeds)
    require.between("num_steps", self.num_steps, 1, 10**6)
    require.between("record_every", self.record_every, 1, self.num_steps)
    if self.num_steps % self.record_every:
      raise errors.UserError(
          f"record_every must divide num_steps={self.num_steps}, got"
          f" {self.record_every}."
      )
    require.positive("step_size", self.step_size)
    require.positive("temperature", self.temperature)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure3Config(Figure2Config):
  """Lower MLP weights along training (Figure 3); the runs of Figure 2.

  Attributes:
    num_seeds: Runs of either mode; the first one's weights are shown.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    num_steps: Full-batch steps.
    record_every: Steps between measurements; divides num_steps.
    step_size: Learning rate of W and z.
    temperature: T of softmax attention.
  """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure4Config:
  """Reduced dynamics of a nonlinear MLP with attention (Figure 4).

  Attributes:
    mu: What each component tends to, positive. The default is the paper's.
    initial: First value of every component, below every mu.
    temperature: T of the attention softmax(v^2 / T).
    step_size: Step size eta of the iteration.
    num_steps: Number of steps of the iteration.
  """

  mu: tuple[float, ...] = published.FIGURE4_MU
  initial: float = 0.05
  temperature: float = 3.0
  step_size: float = 0.02
  num_steps: int = 5000

  def __post_init__(self):
    _require_targets(self.mu, self.initial)
    require.positive("temperature", self.temperature)
    require.positive("step_size", self.step_size)
    require.between("num_steps", self.num_steps, 1, 10**6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InvariantsConfig:
  """Theorem 1 against the step size, on small random blocks.

  Attributes:
    step_sizes: Two or more learning rates, each dividing `time`.
    num_queries: Numbers of queries that share the MLP.
    time: Training time, in units of 1 / (learning rate).
    num_tokens: Number of tokens M.
    num_hidden: Number of hidden nodes K.
    num_samples: Number of samples B, at least as many as queries.
    seed: Random seed for samples, gradients and initial values.
  """

  step_sizes: tuple[float, ...] = (1e-2, 1e-3, 1e-4)
  num_queries: tuple[int, ...] = (1, 3)
  time: float = 0.5
  num_tokens: int = 8
  num_hidden: int = 5
  num_samples: int = 16
  seed: int = 0

  def __post_init__(self):
    _require_seeds(self.seed, 1)
    require.positive("time", self.time)
    if len(set(self.step_sizes)) < 2:
      raise errors.UserError(
          "step_sizes needs two or more values that differ, to see how the"
          f" error falls; got {self.step_sizes}."
      )
    for step_size in self.step_sizes:
      require.positive("step_sizes", step_size)
      steps = self.time / step_size
      if steps < 0.5 or abs(steps - round(steps)) > 1e-6 * steps:
        raise errors.UserError(
            f"step_sizes must divide time={self.time:g} into whole steps, got"
            f" {step_size:g}."
        )
    if not self.num_queries:
      raise errors.UserError("num_queries needs one or more values.")
    for number in self.num_queries:
      require.between("num_queries", number, 1, self.num_samples)
    require.between("num_tokens", self.num_tokens, 2, 1000)
    require.between("num_hidden", self.num_hidden, 1, 1000)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ErfConfig:
  """Theorem 2: linear activation, winner takes all.

  Attributes:
    delta: Delta_l = E[g x_l] of each token, none zero, the largest in absolute
      value only once.
    shown_until: Share of the blow-up time at which curves end, below 1.
    num_times: Points of each curve.
  """

  delta: tuple[float, ...] = (1.0, 0.8, 0.5, 0.1)
  shown_until: float = 0.98
  num_times: int = 197

  def __post_init__(self):
    sizes = sorted(map(abs, self.delta))
    if len(sizes) < 2 or not sizes[0] > 0 or not math.isfinite(sizes[-1]):
      raise errors.UserError(
          "delta needs two or more finite numbers, none of them 0; got"
          f" {self.delta}."
      )
    if sizes[-2] == sizes[-1]:
      raise errors.UserError(
          "One token of delta must be the largest in absolute value, got"
          f" {self.delta}."
      )
    if not 0 < self.shown_until < 1:
      raise errors.UserError(
          f"shown_until must be between 0 and 1, got {self.shown_until}."
      )
    require.between("num_times", self.num_times, 2, 10**5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvergenceConfig:
  """Theorem 4: salient components converge first.

  Attributes:
    mu: What each component tends to: positive, up to 6, from large to small.
    initial: First value of every component, below every mu.
    end_time: Last time of the integration.
    num_times: Points of each curve, equally spaced in ln t from 0.01.
  """

  mu: tuple[float, ...] = (3.0, 2.0, 1.0)
  initial: float = 0.01
  end_time: float = 256.0
  num_times: int = 120

  def __post_init__(self):
    _require_targets(self.mu, self.initial)
    if list(self.mu) != sorted(self.mu, reverse=True) or self.mu[0] > 6:
      raise errors.UserError(
          "mu must fall from one component to the next and not exceed 6, where"
          f" e^(mu^2 / 2) is 6.6e7; got {self.mu}."
      )
    if not 0.01 < self.end_time <= 1e6:
      raise errors.UserError(
          f"end_time must be in (0.01, 1e6], got {self.end_time}."
      )
    require.between("num_times", self.num_times, 2, 10**5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EntropyBounceConfig:
  """Attention entropy falls and rises again; without attention it falls.

  Attributes:
    mu: What each component tends to, positive, up to 6.
    initial: First value of every component, below every mu.
    end_time: Last time of the integration.
    num_times: Points of each curve, equally spaced.
  """

  mu: tuple[float, ...] = (3.0, 2.0, 1.0)
  initial: float = 0.01
  end_time: float = 8.0
  num_times: int = 801

  def __post_init__(self):
    _require_targets(self.mu, self.initial)
    if max(self.mu) > 6:
      raise errors.UserError(f"mu may be up to 6, got {self.mu}.")
    if not 0 < self.end_time <= 1e6:
      raise errors.UserError(
          f"end_time must be in (0, 1e6], got {self.end_time}."
      )
    require.between("num_times", self.num_times, 2, 10**5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HbltConfig:
  """Theorem 5: tokens that co-occur in a hierarchical binary latent tree.

  Attributes:
    num_depths: Number of depths L with nodes; leaves are at depth L - 1.
    branching: Children of every node.
    polarity: rho of the edges, one curve each.
    root_probs: P(y_a = 1 | y_0) for each class y_0, of every node right under
      the root.
    num_top_nodes: Nodes right under the root.
    batch_size: Sequences sampled.
    seed: Random seed for the sampled sequences.
  """

  num_depths: int = 5
  branching: int = 2
  polarity: tuple[float, ...] = (0.5, 0.8, 0.95)
  root_probs: tuple[float, ...] = (0.2, 0.7)
  num_top_nodes: int = 2
  batch_size: int = 100_000
  seed: int = 0

  def __post_init__(self):
    require.between("num_depths", self.num_depths, 2, 10)
    require.between("branching", self.branching, 2, 10)
    require.between("num_top_nodes", self.num_top_nodes, 1, 10)
    num_leaves = self.num_top_nodes * self.branching ** (self.num_depths - 1)
    if num_leaves > 2048:
      raise errors.UserError(
          f"num_depths={self.num_depths}, branching={self.branching} and"
          f" num_top_nodes={self.num_top_nodes} make {num_leaves} leaves; up to"
          " 2048 are compared in pairs."
      )
    if not self.polarity or not self.root_probs:
      raise errors.UserError("polarity and root_probs need a value each.")
    for rho in self.polarity:
      if not -1 <= rho <= 1:
        raise errors.UserError(f"polarity must lie in [-1, 1], got {rho}.")
    for prob in self.root_probs:
      if not 0 < prob < 1:
        raise errors.UserError(f"root_probs must lie in (0, 1), got {prob}.")
    require.between("batch_size", self.batch_size, 1, 10**7)
    _require_seeds(self.seed, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StableRankConfig:
  """Stable rank of the lower MLP layer: falls and rises with attention.

  Attributes:
    num_tokens: Number of tokens M.
    num_hidden: Number of hidden nodes K.
    salience_min: |mu_l| of the least salient token, positive.
    salience_max: |mu_l| of the most salient token, up to 6; tokens in between
      are equally spaced.
    end_time: Last time of the integration.
    num_times: Points of each curve, equally spaced in ln t from 0.01.
    num_seeds: Number of draws of the directions of the mu_l.
    first_seed: The seeds are first_seed, first_seed + 1, ...
  """

  num_tokens: int = 10
  num_hidden: int = 20
  salience_min: float = 1.0
  salience_max: float = 3.0
  end_time: float = 10.0
  num_times: int = 200
  num_seeds: int = 10
  first_seed: int = 0

  def __post_init__(self):
    require.between("num_tokens", self.num_tokens, 2, 1000)
    require.between("num_hidden", self.num_hidden, 2, 1000)
    require.positive("salience_min", self.salience_min)
    if not self.salience_min < self.salience_max <= 6:
      raise errors.UserError(
          f"salience_max must be above salience_min={self.salience_min:g} and"
          f" up to 6, got {self.salience_max}."
      )
    if not 0.01 < self.end_time <= 1e6:
      raise errors.UserError(
          f"end_time must be in (0.01, 1e6], got {self.end_time}."
      )
    require.between("num_times", self.num_times, 2, 10**5)
    _require_seeds(self.first_seed, self.num_seeds)


def _require_seeds(first_seed: int, num_seeds: int) -> None:
  require.between("num_seeds", num_seeds, 1, 10**4)
  require.between("first_seed", first_seed, 0, 2**31 - num_seeds)


def _require_targets(mu: Iterable[float], initial: float) -> None:
  mu = tuple(mu)
  if len(mu) < 2:
    raise errors.UserError(f"mu needs two or more components, got {mu}.")
  for value in mu:
    require.positive("mu", value)
  if not 0 <= initial < min(mu):
    raise errors.UserError(
        f"initial must be from 0 to below every mu, {min(mu):g}, got {initial}."
    )
