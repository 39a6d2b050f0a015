"""Drafts by the names that flags give them; imports no jax."""

import dataclasses

from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class NGram:
  """What followed the last tokens where they stood before.

  Attributes:
    n: The last tokens that are looked for, at most: where fewer are found, as
      many as are.
    least: As many must be found, or nothing is guessed.
    k: Tokens that are guessed a step.
  """

  n: int = 3
  least: int = 2
  k: int = 4

  def __post_init__(self):
    require.at_least("n", self.n, 1)
    require.at_least("least", self.least, 1)
    if self.n < self.least:
      raise errors.UserError(
          f"n={self.n} is below least={self.least}: of up to n tokens at the"
          " text's end at least so many must be found again."
      )
    require.at_least("k", self.k, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
  """What another model with the same tokens says.

  Attributes:
    k: Tokens that are guessed a step.
  """

  k: int = 4

  def __post_init__(self):
    require.at_least("k", self.k, 1)


_KINDS: dict[str, type[NGram] | type[Model]] = {"ngram": NGram, "model": Model}


def parse(text: str) -> NGram | Model:
  """Returns the draft of `ngram:n=3:k=4` or `model:k=4`.

  Raises:
    UserError: If the name or a setting is unknown, or no whole number from 1.
  """
  name, *settings = text.split(":")
  if name not in _KINDS:
    raise errors.UserError(
        f"draft={text!r} is unknown; there are {' and '.join(_KINDS)}, as"
        " ngram:n=3:k=4."
    )
  kind, fields = _KINDS[name], {}
  known = [field.name for field in dataclasses.fields(kind)]
  for setting in settings:
    field, _, value = setting.partition("=")
    if field not in known or not value.removeprefix("-").isdecimal():
      raise errors.UserError(
          f"draft={text!r}: settings of {name} are whole numbers,"
          f" {' and '.join(f':{field}=1' for field in known)}, got {setting!r}."
      )
    fields[field] = int(value)
  return kind(**fields)
