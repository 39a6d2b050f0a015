"""The axes of a mesh of devices, and their sizes as a flag; imports no jax."""

from collections.abc import Sequence

from scansnap_jax.experiment.errors import UserError

AXES = ("data", "fsdp", "tensor", "seq")


def sizes_of(text: str) -> tuple[int, ...]:
  """Sizes of the axes, from text such as 1,16,4 or 1,16,1,4.

  Raises:
    UserError: It is none.
  """
  parts = text.split(",")
  is_known = len(parts) in (len(AXES) - 1, len(AXES))
  if not is_known or not all(part.isdecimal() and int(part) for part in parts):
    raise UserError(
        f"mesh={text} must be numbers from 1 for data, fsdp, tensor and, if"
        " wanted, seq, as 1,64,1 or 1,16,1,4."
    )
  return (*map(int, parts), 1)[: len(AXES)]


def text_of(sizes: Sequence[int]) -> str:
  """The inverse of `sizes_of`."""
  return ",".join(map(str, sizes))


def divisors(number: int) -> list[int]:
  """All of them, from 1."""
  return [n for n in range(1, number + 1) if number % n == 0]


def listed(numbers: Sequence[int]) -> str:
  """For a sentence that says which would do."""
  return ", ".join(map(str, numbers))
