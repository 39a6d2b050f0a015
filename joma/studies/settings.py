"""What the settings of several studies are held to."""

from collections.abc import Iterable
import math
from typing import Protocol, runtime_checkable

from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require


@runtime_checkable
class _Seeded(Protocol):
  """Settings of runs from several seeds."""

  @property
  def num_seeds(self) -> int:
    ...

  @property
  def first_seed(self) -> int:
    ...


@runtime_checkable
class _Trained(_Seeded, Protocol):
  """Settings of runs that train from several seeds."""

  @property
  def num_steps(self) -> int:
    ...

  @property
  def num_records(self) -> int:
    ...


@runtime_checkable
class _Rated(_Trained, Protocol):
  """Settings of runs that train at one rate."""

  @property
  def rate(self) -> float:
    ...


@runtime_checkable
class _OnTrees(_Trained, Protocol):
  """Settings of runs on latent trees."""

  @property
  def num_classes(self) -> int:
    ...

  @property
  def num_roots(self) -> int:
    ...

  @property
  def branching(self) -> tuple[int, ...]:
    ...

  @property
  def hidden_dim(self) -> int:
    ...

  @property
  def batch_size(self) -> int:
    ...

  @property
  def num_held_out(self) -> int:
    ...

  @property
  def step_size(self) -> float:
    ...


def seeds(config: _Seeded) -> range:
  """The seeds of a study, first_seed and those that follow it."""
  return range(config.first_seed, config.first_seed + config.num_seeds)


def require_seeds(first_seed: int, num_seeds: int) -> None:
  """Raises UserError unless all seeds are seeds, and there is one or more."""
  require.between("num_seeds", num_seeds, 1, 10**4)
  require.seeds("first_seed", first_seed, num_seeds)


def require_targets(mu: Iterable[float], initial: float) -> None:
  """Raises UserError unless targets are positive and above the first value."""
  mu = tuple(mu)
  if len(mu) < 2:
    raise errors.UserError(f"mu needs two or more components, got {mu}.")
  for value in mu:
    require.positive("mu", value)
  if not 0 <= initial < min(mu):
    raise errors.UserError(
        f"initial must be from 0 to below every mu, {min(mu):g}, got {initial}."
    )


def check_runs(config: _Trained) -> None:
  """Raises UserError unless seeds, steps and records of a study fit."""
  # Intervals over seeds need two.
  require.at_least("num_seeds", config.num_seeds, 2)
  require.seeds("first_seed", config.first_seed, config.num_seeds)
  require.memory(
      f"num_steps={config.num_steps} of {config.num_seeds} seeds",
      4 * config.num_seeds * config.num_steps,
  )
  require.at_least("num_records", config.num_records, 1)
  if config.num_steps < 1 or config.num_steps % config.num_records:
    raise errors.UserError(
        f"num_steps must be a multiple of num_records={config.num_records},"
        f" got {config.num_steps}."
    )


def check_trained(config: _Rated, *sizes: str) -> None:
  """Raises UserError unless runs fit, the rate is positive, sizes 1 or more.

  Args:
    config: Settings of a study.
    sizes: Names of those of which there must be one at least.
  """
  check_runs(config)
  for name in sizes:
    require.at_least(name, getattr(config, name), 1)
  require.positive("rate", config.rate)


def check_tree(config: _OnTrees) -> None:
  """Raises UserError unless a study's tree has as many classes as it needs."""
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


def require_several(name: str, values: tuple[float | int, ...]) -> None:
  """Raises UserError unless there are two or more positive values."""
  if len(set(values)) < 2 or len(set(values)) < len(values):
    raise errors.UserError(
        f"{name} needs two or more different values, got {values}."
    )
  for value in values:
    require.positive(name, value)


def sizes_of_trees(config: _OnTrees) -> dict[str, int]:
  """Picks from a study's settings what `tree_runs.train` takes by name."""
  names = ("num_classes", "hidden_dim", "batch_size", "num_held_out")
  sizes = {
      name: getattr(config, name)
      for name in (*names, "num_steps", "num_records")
  }
  num_tokens = config.num_roots * math.prod(config.branching)
  return {"num_tokens": num_tokens, **sizes}


def require_multiple(name: str, value: int, of: int) -> None:
  """Raises UserError unless a size is a positive multiple of another."""
  if value < of or value % of:
    raise errors.UserError(f"{name} must be a multiple of {of}, got {value}.")


def require_choices(
    name: str, values: tuple[str, ...], known: tuple[str, ...]
) -> None:
  """Raises UserError unless there is one value or more, all of them known."""
  wrong = [value for value in values if value not in known]
  if wrong or not values or len(set(values)) < len(values):
    raise errors.UserError(
        f"{name} must be one or more of {', '.join(known)}, each once; got"
        f" {', '.join(values) or 'none'}."
    )
