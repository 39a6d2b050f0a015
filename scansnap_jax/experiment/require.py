"""What a setting must be, or else one sentence says what would be right.

Imports no jax, so that command lines answer at once.
"""

import math

from scansnap_jax.experiment import errors


def at_least(name: str, value: int, least: int) -> None:
  """Raises UserError if a number is smaller than `least`."""
  if value < least:
    raise errors.UserError(f"{name} must be at least {least}, got {value}.")


def between(name: str, value: int, least: int, most: int) -> None:
  """Raises UserError if a number is outside of [least, most]."""
  if not least <= value <= most:
    raise errors.UserError(
        f"{name} must be from {least} to {most}, got {value}."
    )


def positive(name: str, value: int | float) -> None:
  """Raises UserError if a number is not positive, infinite or NaN."""
  if not (value > 0 and math.isfinite(value)):
    raise errors.UserError(f"{name} must be positive and finite, got {value}.")


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
  """Raises UserError unless a word is among the choices."""
  if value not in choices:
    raise errors.UserError(f"{name}={value!r} must be one of {choices}.")
