"""What a setting must be, or else one sentence says what would be right.

Imports no jax, so that command lines answer at once.
"""

from collections.abc import Iterable
import math
from typing import Any

from scansnap_jax.experiment import errors
from scansnap_jax.experiment.processes import limits

_LARGEST_SEED = 2**31 - 1
# Indices and counters on devices are of int32.
_LARGEST_COUNT = 2**31 - 1


def at_least(name: str, value: int, least: int) -> None:
  """Raises UserError if a count is smaller than `least`, or beyond int32."""
  if value < least:
    raise errors.UserError(f"{name} must be at least {least}, got {value}.")
  if value > _LARGEST_COUNT:
    raise errors.UserError(
        f"{name} may be up to {_LARGEST_COUNT}, got {value}."
    )


def between(name: str, value: int, least: int, most: int) -> None:
  """Raises UserError if a number is outside of [least, most]."""
  if not least <= value <= most:
    raise errors.UserError(
        f"{name} must be from {least} to {most}, got {value}."
    )


def seeds(name: str, first: int, count: int = 1) -> None:
  """Raises UserError unless all seeds from `first` on are in [0, 2^31).

  One range for every script: jax takes 2^32 for 0, and -1 for 2^32 - 1.
  """
  last = first + count - 1
  if count > _LARGEST_SEED:
    raise errors.UserError(
        f"{name} and those after it are {count} seeds, and there are"
        f" {_LARGEST_SEED + 1}."
    )
  if first < 0 or last > _LARGEST_SEED:
    raise errors.UserError(
        f"{name} must be from 0 to {_LARGEST_SEED - count + 1}, got {first}."
    )


def bounded(name: str, rate: float, leaves: Iterable[Any]) -> None:
  """Raises UserError if the square of a trained parameter is not finite.

  A norm, or a bounded read-out, hides weights that are far off from the loss.

  Args:
    name: Of the learning rate.
    rate: Its value.
    leaves: Arrays of the parameters, float32.
  """
  import numpy as np

  # Not Python's max, which a NaN may slip through.
  largest = np.max([abs(leaf).max() for leaf in leaves])
  if not largest < np.sqrt(np.finfo(np.float32).max):
    raise errors.UserError(
        f"training diverged with {name}={rate:g}: a parameter became"
        f" {largest:.3g}. Use a smaller rate, in a new workdir."
    )


def memory(what: str, num_bytes: int | float) -> None:
  """Raises UserError if arrays are larger than all memory there is.

  Args:
    what: The setting and its value, as `num_steps=1000`.
    num_bytes: What it would take, in bytes.
  """
  total, holder = limits.memory()
  if num_bytes > total:
    raise errors.UserError(
        f"{what} would take {num_bytes / 1e9:,.1f} GB of memory; {holder}"
        f" {total / 1e9:,.1f}."
    )


def positive(name: str, value: int | float) -> None:
  """Raises UserError if a number is not positive, infinite or NaN."""
  if not (value > 0 and math.isfinite(value)):
    raise errors.UserError(f"{name} must be positive and finite, got {value}.")


def not_negative(name: str, value: int | float) -> None:
  """Raises UserError if a number is negative, infinite or NaN."""
  if not (value >= 0 and math.isfinite(value)):
    raise errors.UserError(
        f"{name} must be finite and not negative, got {value}."
    )


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
  """Raises UserError unless a word is among the choices."""
  if value not in choices:
    raise errors.UserError(f"{name}={value!r} must be one of {choices}.")
