"""Numbers in an option of an entry, which commas would cut: 0.3.5."""

from scansnap_jax.experiment import errors


def numbers(option: str, text: str) -> tuple[int, ...]:
  """Returns the numbers of a text with dots between; () of an empty one.

  Args:
    option: As `act: heads`, for the message.
    text: What was given.

  Raises:
    UserError: It is something else.
  """
  found = text.split(".") if text else []
  if not all(number.isdecimal() for number in found):
    raise errors.UserError(
        f"{option}={text!r} must be numbers with dots between, as 0.3.5."
    )
  return tuple(map(int, found))
